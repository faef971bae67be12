//! One request, one answer. Nobody behind this file sees a token or a payload.

use tiny_http::Method::{Get, Head, Options, Post};

use crate::http::{Answer, Request};
use crate::{error::Refusal, error::ensure, hub::Hub, metrics::answers};

/// Characters in the longest token of a query: 64 topics of 40 bytes; a millisecond to open.
const MAX_TOKEN: usize = 4096;

const TEXT: &str = "Content-Type: text/plain; charset=utf-8\r\n";

const PROMETHEUS: &str = "Content-Type: text/plain; version=0.0.4\r\n";

/// no-transform, since what compresses a stream on its way holds it back.
const STREAM: &str = "Content-Type: text/event-stream; charset=utf-8\r\n\
    Cache-Control: no-store, no-transform\r\nX-Accel-Buffering: no\r\n";

const PREFLIGHT: &str = "Access-Control-Allow-Methods: GET, HEAD, POST, OPTIONS\r\n\
    Access-Control-Allow-Headers: Cache-Control, Content-Type, Last-Event-ID";

/// Which of a server's two addresses a connection came to.
#[derive(Clone, Copy, PartialEq)]
pub enum Door {
    /// For clients and backends.
    Public,
    /// For the operator: serves the metrics, and nothing else.
    Metrics,
}

/// Answers a request, or what was refused as none; counts, and says in the log what is wrong.
/// Nothing where the connection is to be closed unanswered. Blocks where [`Hub::publish`] does, and
/// for seconds at most where others have long tokens opened.
pub fn reply(hub: &Hub, door: Door, request: &Result<Request, Refusal>) -> Option<Answer> {
    let decided = match request {
        Ok(request) => decide(hub, door, request),
        Err(refusal) => Err(refusal.clone()),
    };
    let mut accepted = request.iter().flat_map(|it| it.values("Accept"));
    let mut answer = match decided {
        Ok(answer) => {
            hub.metrics.add(&answers(answer.status), 1);
            answer
        }
        // By the HTML standard any answer but 200 ends an EventSource for good; a connection that
        // breaks is tried again.
        Err(Refusal { status: 503, text }) if accepted.any(is_stream) => {
            let line = format_args!("stream turned away: {text}");
            hub.metrics.warn("sse_streams_turned_away_total", line);
            return None;
        }
        Err(refusal) => refuse(hub, &refusal),
    };
    if door == Door::Public {
        // Errors too, or no browser shows them.
        let origin = &hub.config.allow_origin;
        answer.fields += &format!("Access-Control-Allow-Origin: {origin}\r\n");
    }
    Some(answer)
}

fn is_stream(kind: &str) -> bool {
    kind.starts_with("text/event-stream")
}

fn refuse(hub: &Hub, Refusal { status, text }: &Refusal) -> Answer {
    // What is quoted may be a part of the payload, which is not for the log.
    let why = text.split(['"', '`']).next().unwrap_or_default();
    let line = format_args!("request refused: status={status} {why}");
    hub.metrics.warn(&answers(*status), line);
    let field = match status {
        401 => "WWW-Authenticate: Branca\r\n",
        405 => &format!("Allow: {text}\r\n"),
        503 => "Retry-After: 5\r\n",
        _ => "",
    };
    answer(*status, &[TEXT, field], format!("{text}\n"))
}

fn answer(status: u16, fields: &[&str], body: String) -> Answer {
    let length = format!("Content-Length: {}\r\n", body.len());
    Answer {
        status,
        fields: fields.concat() + &length,
        body,
        stream: None,
    }
}

fn answer_without_body(status: u16, fields: String) -> Answer {
    Answer {
        status,
        fields,
        body: String::new(),
        stream: None,
    }
}

fn decide(hub: &Hub, door: Door, request: &Request) -> Result<Answer, Refusal> {
    let (status, problem) = match (door, request.path.as_str(), &request.method) {
        (Door::Public, _, Options) => return Ok(preflight(request)),
        (Door::Public, "/events", Get | Head) => return open_stream(hub, request),
        (Door::Public, "/submit", Post) => return submit(hub, request),
        (Door::Public, "/ping", Get | Head) => return Ok(answer(200, &[TEXT], "ok\n".into())),
        (Door::Public, "/events" | "/ping", _) => (405, "GET, HEAD, OPTIONS"),
        (Door::Public, "/submit", _) => (405, "POST, OPTIONS"),
        (Door::Public, ..) => (404, "no such path: try /events, /submit or /ping"),
        (Door::Metrics, "/metrics", Get | Head) => {
            return Ok(answer(200, &[PROMETHEUS], hub.print_metrics()));
        }
        (Door::Metrics, "/metrics", _) => (405, "GET, HEAD"),
        (Door::Metrics, ..) => (404, "no such path: try /metrics"),
    };
    Err(Refusal::new(status, problem))
}

fn open_stream(hub: &Hub, request: &Request) -> Result<Answer, Refusal> {
    let mut parameters = request.query.split('&');
    let token = parameters.find_map(|it| it.strip_prefix("token="));
    let (token, config) = (token.unwrap_or_default(), &hub.config);
    ensure(token.len() <= MAX_TOKEN, 414, "the token is too long")?;
    let (ttl, max_topics) = (config.token_ttl, config.max_topics);
    let topics = config.key.open_subscription(token, ttl, max_topics)?;
    hub.room()?;
    let chunked = "Transfer-Encoding: chunked\r\n";
    let fields = [STREAM, if request.modern { chunked } else { "" }];
    let mut answer = answer_without_body(200, fields.concat());
    answer.stream = Some(topics).filter(|_| request.method == Get);
    Ok(answer)
}

fn submit(hub: &Hub, request: &Request) -> Result<Answer, Refusal> {
    let (config, too_long) = (&hub.config, "the body is over SSE_MAX_BODY bytes");
    ensure(request.body.is_some(), 413, too_long)?;
    // A shell's line end behind the token is no part of it; what is not ASCII is no token.
    let body = request.body.as_deref().unwrap_or_default().trim_ascii();
    let token = str::from_utf8(body).unwrap_or("?");
    let events = config.key.open_submission(token, config.submit_ttl)?;
    let receipt = hub.publish(&events)?;
    let (events, deliveries) = (receipt.events, receipt.deliveries);
    let text = format!("{{\"events\": {events}, \"deliveries\": {deliveries}}}\n");
    Ok(answer(200, &["Content-Type: application/json\r\n"], text))
}

/// What a browser asks before a page may send fields of its own: those that it names are allowed,
/// since tracing libraries add theirs to every request.
fn preflight(request: &Request) -> Answer {
    let named = request.values("Access-Control-Request-Headers");
    let named: String = named.map(|name| format!(", {name}")).collect();
    answer_without_body(204, format!("{PREFLIGHT}{named}\r\n"))
}
