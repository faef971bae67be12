//! One request, one answer. What is behind this file decides nothing by a token or a payload.

use tiny_http::Method::{Get, Head, Options, Post};

use crate::http::{Answer, Received, Request};
use crate::{config::Config, error::Refusal, error::ensure, hub::Hub, token::MAX_QUERY_TOKEN};

const JSON: &str = "Content-Type: application/json\r\n";

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
/// Nothing where the connection is to be closed unanswered. Blocks where [`Hub::publish`] does.
pub fn reply(hub: &Hub, door: Door, request: &Received<Request>) -> Option<Answer> {
    let decided = match request {
        Ok(request) => decide(hub, door, request),
        Err(refusal) => Err(refusal.clone()?),
    };
    let mut accepted = request.iter().flat_map(|it| it.values("Accept"));
    let mut answer = match decided {
        Ok(answer) => {
            hub.metrics.answered(answer.status).add(1);
            answer
        }
        // By the HTML standard any answer but 200 ends an EventSource for good; a connection that
        // breaks is tried again.
        Err(Refusal {
            status: 503, text, ..
        }) if accepted.any(is_stream) => {
            let line = format_args!("stream turned away: {text}");
            hub.metrics.turned_away.warn(line);
            return None;
        }
        Err(refusal) => refuse(hub, &refusal),
    };
    if door == Door::Public {
        let mut origins = request.iter().flat_map(|it| it.values("Origin"));
        let origin = origins.find(|it| is_plain(it));
        answer.fields += &allow_origin(&hub.config.allow_origin, origin);
    }
    Some(answer)
}

/// Lets pages of other origins read an answer, or an error, which else no browser shows. An origin
/// is echoed, since beside `*` browsers take no credentials; none are read here.
fn allow_origin(allowed: &str, origin: Option<&str>) -> String {
    let mut listed = allowed.split(',').map(str::trim);
    let fields = match origin {
        Some(origin) if allowed == "*" || listed.any(|it| it == origin) => format!(
            "Access-Control-Allow-Origin: {origin}\r\nAccess-Control-Allow-Credentials: true\r\n"
        ),
        Some(_) => String::new(),
        None => {
            let first = listed.next().unwrap_or_default();
            format!("Access-Control-Allow-Origin: {first}\r\n")
        }
    };
    fields + "Vary: Origin\r\n"
}

/// What may be repeated in an answer.
fn is_plain(value: &str) -> bool {
    !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_graphic())
}

fn is_stream(kind: &str) -> bool {
    kind.starts_with("text/event-stream")
}

fn refuse(hub: &Hub, Refusal { status, text, .. }: &Refusal) -> Answer {
    let line = format_args!("request refused: {text} status={status}");
    hub.metrics.answered(*status).warn(line);
    let field = match status {
        401 => "WWW-Authenticate: Branca\r\n",
        405 => &format!("Allow: {text}\r\n"),
        503 => "Retry-After: 5\r\n",
        _ => "",
    };
    let fields = [TEXT, field].concat();
    answer(*status, fields, format!("{text}\n"))
}

fn answer(status: u16, fields: impl Into<String>, body: String) -> Answer {
    Answer {
        status,
        fields: fields.into(),
        body,
        stream: None,
        authentic: false,
    }
}

fn decide(hub: &Hub, door: Door, request: &Request) -> Result<Answer, Refusal> {
    let (status, problem) = match (door, request.path.as_str(), &request.method) {
        (Door::Public, _, Options) => return Ok(preflight(request)),
        (Door::Public, "/events", Get | Head) => return open_stream(hub, request),
        (Door::Public, "/submit", Post) => return submit(hub, request),
        (Door::Public, "/ping", Get | Head) => {
            return Ok(answer(200, TEXT, "ok\n".into()));
        }
        (Door::Public, "/events" | "/ping", _) => (405, "GET, HEAD, OPTIONS"),
        (Door::Public, "/submit", _) => (405, "POST, OPTIONS"),
        (Door::Public, ..) => (404, "no such path: try /events, /submit or /ping"),
        (Door::Metrics, "/metrics", Get | Head) => {
            return Ok(answer(200, PROMETHEUS, hub.print_metrics()));
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
    let fits = token.len() <= MAX_QUERY_TOKEN;
    ensure(fits, 414, "the token is over 4096 characters")?;
    let (ttl, max_topics) = (config.token_ttl, config.max_topics);
    let opened = config.key.open_subscription(token, ttl, max_topics);
    let subscription = match (opened, &config.renew_url) {
        // Followed by the browser itself, without which a plain EventSource ends for good.
        (Err(refusal), Some(url)) if refusal.expired => {
            let fields = format!("Location: {url}\r\nCache-Control: no-store\r\n");
            return Ok(answer(
                307,
                fields,
                format!("{}: see Location\n", refusal.text),
            ));
        }
        (opened, _) => opened?,
    };
    hub.room()?;
    let chunked = "Transfer-Encoding: chunked\r\n";
    let fields = [STREAM, if request.modern { chunked } else { "" }];
    let mut answer = answer(200, fields.concat(), String::new());
    answer.stream = Some(subscription).filter(|_| request.method == Get);
    Ok(answer)
}

fn submit(hub: &Hub, request: &Request) -> Result<Answer, Refusal> {
    let (config, too_long) = (&hub.config, "the body is over SSE_MAX_BODY bytes");
    ensure(request.body.is_some(), 413, too_long)?;
    // A shell's line end behind the token is no part of it; what is not ASCII is no token.
    let body = request.body.as_deref().unwrap_or_default().trim_ascii();
    let token = str::from_utf8(body).unwrap_or("?");
    let events = config.key.open_submission(token, config.submit_ttl)?;
    let receipt = hub.submit(Some(token), &events)?;
    let (events, deliveries) = (receipt.events, receipt.deliveries);
    let text = match &hub.relay {
        // Who hears it elsewhere is not known here.
        Some(_) => format!("{{\"events\": {events}}}\n"),
        None => format!("{{\"events\": {events}, \"deliveries\": {deliveries}}}\n"),
    };
    let mut answer = answer(200, JSON, text);
    answer.authentic = true;
    Ok(answer)
}

/// What a client heard last: as browsers say it by themselves, or in the query; or nothing.
pub fn last_event_id(request: &Request) -> &str {
    let mut parameters = request.query.split('&');
    let asked = parameters.find_map(|it| it.strip_prefix("last_event_id="));
    let field = request.values("Last-Event-ID").next();
    field.or(asked).unwrap_or_default()
}

/// What a browser asks before a page may send fields of its own: those that it names are allowed,
/// since tracing libraries add theirs to every request.
fn preflight(request: &Request) -> Answer {
    let named = request.values("Access-Control-Request-Headers");
    let named = named.filter(|name| is_plain(name));
    let named: String = named.map(|name| format!(", {name}")).collect();
    answer(204, format!("{PREFLIGHT}{named}\r\n"), String::new())
}

impl Config {
    /// What a server with these settings thinks of a token, as JSON: what it holds, which key made
    /// it, how many seconds ago, and until when it is good, in seconds since 1970; or why it is
    /// refused.
    pub fn explain(&self, token: &str) -> String {
        let (ttl, topics, submit_ttl) = (self.token_ttl, self.max_topics, self.submit_ttl);
        let told = self.key.explain(token.trim(), ttl, topics, submit_ttl);
        let refused =
            |it: Refusal| format!(r#"{{"refused": {:?}, "status": {}}}"#, it.text, it.status);
        told.unwrap_or_else(refused)
    }
}
