//! One request, one answer. Nobody behind this file sees a token or a payload.

use std::{io, io::Read, sync::atomic::Ordering::SeqCst};

use tiny_http::{Header, Method, Request, Response};

use crate::{error::Refusal, event, event::Topics, server::Server};

/// Characters in the longest token of a query: 64 topics of 40 bytes; a millisecond to open.
const MAX_TOKEN: usize = 4096;
/// Bytes of a chunked body that are read. More than are kept, so that the sender of an oversized
/// one sees the answer: closing on unread bytes resets the connection.
const MAX_READ: usize = 2 * 1024 * 1024;
/// No length and no chunks: the stream ends with the connection, also behind HTTP/1.0 proxies.
const STREAM_HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\
    Cache-Control: no-store\r\nX-Accel-Buffering: no\r\nConnection: close\r\n";
/// Any page may ask: what protects a stream is its token.
const PREFLIGHT: &str = "Access-Control-Allow-Methods: GET, POST, OPTIONS
Access-Control-Allow-Headers: Cache-Control, Content-Type, Last-Event-ID";

/// Answers a request, or makes its connection a stream; whether it was the last one to be read
/// from the connection. `metrics`: it came to the address for metrics.
pub fn respond(server: &Server, metrics: bool, mut request: Request) -> bool {
    let (hub, url) = (&server.hub, request.url().to_string());
    let origin = &server.config.allow_origin;
    let cors = format!("Access-Control-Allow-Origin: {origin}");
    let (path, query) = url.split_once('?').unwrap_or((&url, ""));
    let (known, allow) = match path {
        "/metrics" if metrics => ("/metrics", "Allow: GET"),
        "/events" if !metrics => ("/events", "Allow: GET, OPTIONS"),
        "/submit" if !metrics => ("/submit", "Allow: POST, OPTIONS"),
        "/ping" if !metrics => ("/ping", "Allow: GET, HEAD, OPTIONS"),
        _ => ("other", ""),
    };
    let outcome = match (request.method(), known) {
        (_, "other") => Err(Refusal::new(404, "no such path: try /events or /submit")),
        (Method::Get, "/metrics") => Ok(("", hub.journal.render(&hub.gauges()))),
        (Method::Get, "/events") => match authorize(server, query) {
            Ok(topics) => {
                let mut head = format!("{STREAM_HEAD}{cors}\r\n\r\n").into_bytes();
                head.extend_from_slice(&event::retry(server.config.retry));
                hub.subscribe(topics, head, request.into_writer());
                return true;
            }
            Err(refusal) => Err(refusal),
        },
        (Method::Post, "/submit") => submit(server, &mut request),
        (Method::Get | Method::Head, "/ping") => Ok(("", "ok".into())),
        (Method::Options, _) if !metrics => Ok((PREFLIGHT, String::new())),
        _ => Err(Refusal::new(405, format!("wrong method. {allow}"))),
    };
    // What is left of a refused body must not be read as the next request, nor a body that nobody
    // wanted.
    let sent = |name| request.headers().get(name).is_some();
    let framed = sent("Content-Length") || sent("Transfer-Encoding");
    let last = outcome.is_err() || framed && *request.method() != Method::Post;
    let (status, fields, body) = match outcome {
        Ok((PREFLIGHT, body)) => (204, PREFLIGHT, body),
        Ok((fields, body)) => (200, fields, body + "\n"),
        Err(Refusal { status: 405, text }) => (405, allow, text + "\n"),
        Err(Refusal { status: 503, text }) => (503, "Retry-After: 5", text + "\n"),
        Err(Refusal { status, text }) => (status, "", text + "\n"),
    };
    let name = format!("sse_answers_total{{path=\"{known}\",status=\"{status}\"}}");
    // What is quoted may be a part of the payload, which is not for the log.
    let why = body.split(['"', '`', '\n']).next().unwrap_or_default();
    match status {
        200..300 => hub.journal.add(&name, 1),
        _ => hub.journal.warn(&name, &format!("{known} {status}: {why}")),
    }
    let mut response = Response::from_string(body).with_status_code(status);
    for line in fields.lines().chain([&*cors]) {
        let header: Header = line.parse().expect("constant or checked at start");
        response.add_header(header);
    }
    // Nor may an answer follow half of one that the client did not take.
    request.respond(response).is_err() || last || hub.closed.load(SeqCst)
}

fn authorize(server: &Server, query: &str) -> Result<Topics, Refusal> {
    let token = query.split('&').find_map(|it| it.strip_prefix("token="));
    let token = token.unwrap_or_default();
    if token.len() > MAX_TOKEN {
        return Err(Refusal::new(414, "the token is too long"));
    }
    let topics = server.config.key.open_subscription(token, &server.config)?;
    server.hub.admit().map(|()| topics)
}

fn submit(server: &Server, request: &mut Request) -> Result<(&'static str, String), Refusal> {
    let (max, size) = (server.config.max_body as usize, request.body_length());
    let (mut length, mut body) = (size.unwrap_or_default(), Vec::new());
    if length <= max {
        // The library sets no end where a client asks for an upgrade; what is declared does.
        let mut reader = request.as_reader().take(size.unwrap_or(MAX_READ) as u64);
        let read = (&mut reader).take(max as u64 + 1).read_to_end(&mut body);
        length = read.map_err(|_| Refusal::new(400, "the body is malformed or stalled"))?;
        let _discarded = io::copy(&mut reader, &mut io::sink());
    }
    if length > max {
        return Err(Refusal::new(413, format!("the body is over {max} bytes")));
    }
    // A shell's line end behind the token is no part of it; what is not ASCII is no token.
    let token = str::from_utf8(body.trim_ascii()).unwrap_or("?");
    let events = server.config.key.open_submission(token, &server.config)?;
    let done = server.hub.publish(&events)?;
    let (events, deliveries) = (done.events, done.deliveries);
    let body = format!("{{\"events\": {events}, \"deliveries\": {deliveries}}}");
    Ok(("Content-Type: application/json", body))
}
