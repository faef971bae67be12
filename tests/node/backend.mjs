// The backend's side of sse-server in Node: npm install branca @msgpack/msgpack
import { createServer } from "node:http";
import { text } from "node:stream/consumers";
import { encode } from "@msgpack/msgpack";
import Branca from "branca";

const PUSH_URL = process.env.PUSH_URL ?? "http://127.0.0.1:8000"; // as this backend reaches it
const PUSH_PUBLIC_URL = process.env.PUSH_PUBLIC_URL ?? PUSH_URL; // as browsers reach it
const branca = Branca(process.env.SSE_SECRET.split(",")[0]);

// Where to send a browser that may read these topics.
function eventsUrl(...topics) {
  return `${PUSH_PUBLIC_URL}/events?token=${branca.encode(encode({ topics }))}`;
}

// Delivers all of the events, in order, or none: publish({ topic, event, data }, …)
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
  try {
    if (request.method === "GET" && request.url === "/events") {
      response.writeHead(307, { Location: eventsUrl("news"), "Cache-Control": "no-store" }).end();
    } else if (request.method === "POST" && request.url === "/news") {
      const receipt = await publish({ topic: "news", event: "", data: await text(request) });
      response.end(JSON.stringify(receipt));
    } else {
      response.writeHead(404).end();
    }
  } catch (error) {
    response.writeHead(502).end(error.message);
  }
});
server.listen(Number(process.env.PORT ?? 3000), "127.0.0.1", () => {
  console.log(`listening on http://127.0.0.1:${server.address().port}`);
});
