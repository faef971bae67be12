// The backend's side of sse-server in Node: npm install branca @msgpack/msgpack
import { createServer } from "node:http";
import { text } from "node:stream/consumers";
import { encode } from "@msgpack/msgpack";
import Branca from "branca";

const PUSH_URL = process.env.PUSH_URL ?? "http://127.0.0.1:8000"; // as this backend reaches it
const PUSH_PUBLIC_URL = process.env.PUSH_PUBLIC_URL ?? PUSH_URL; // as browsers reach it
if (!process.env.SSE_SECRET) throw new Error("SSE_SECRET is not set");
const branca = Branca(process.env.SSE_SECRET.split(",")[0].trim());

// Where to send a browser that may read these topics.
function eventsUrl(...topics) {
  return `${PUSH_PUBLIC_URL}/events?token=${branca.encode(encode({ topics }))}`;
}

// Delivers all of the events, in order, or none: publish({ topic, event, data }, …). Where it throws,
// what was changed before stays changed: log it, and do not let the user do it twice.
async function publish(...events) {
  const answer = await fetch(`${PUSH_URL}/submit`, {
    method: "POST",
    body: branca.encode(encode({ events })),
    signal: AbortSignal.timeout(5000),
  });
  if (!answer.ok) throw new Error(`not published: ${answer.status} ${await answer.text()}`);
  return answer.json(); // { events, deliveries }
}

// An application that uses both: GET /events to listen, POST /news to tell everyone.
const server = createServer(async (request, response) => {
  const { pathname } = new URL(request.url, "http://localhost");
  // For pages of another origin every answer here needs a field (with cookies one more: see the README):
  // response.setHeader("Access-Control-Allow-Origin", "https://app.example");
  try {
    if (request.method === "GET" && pathname === "/events") { // check here who asks
      response.writeHead(307, { Location: eventsUrl("news"), "Cache-Control": "no-store" }).end();
    } else if (request.method === "POST" && pathname === "/news") {
      const receipt = await publish({ topic: "news", event: "", data: await text(request) });
      response.end(JSON.stringify(receipt));
    } else {
      response.writeHead(404).end();
    }
  } catch (error) {
    console.warn(error.message, error.cause ?? "");
    response.writeHead(502).end(error.message);
  }
});
server.listen(Number(process.env.PORT ?? 3000), "127.0.0.1", () => {
  console.log(`listening on http://127.0.0.1:${server.address().port}`);
});
