// The npm package better-sse behind node's own HTTP server, as its guide has it; where it is
// installed is the argument. GET /sub/TOPIC is a stream, POST /pub/TOPIC an event.
import http from "node:http";

const { createChannel, createSession } = await import(process.argv[2]);

const channels = new Map();
function channel(topic) {
  if (!channels.has(topic)) channels.set(topic, createChannel());
  return channels.get(topic);
}

const server = http.createServer(async (request, response) => {
  const [, action, topic] = request.url.split("/");
  if (action === "sub") {
    // Data as it is, instead of as JSON; the space is what the clients expect.
    const session = await createSession(request, response, { serializer: (data) => " " + data });
    channel(topic).register(session);
    return;
  }
  let data = "";
  request.setEncoding("utf8");
  for await (const part of request) data += part;
  channel(topic).broadcast(data);
  response.end("ok");
});
server.keepAliveTimeout = 0;
server.listen({ host: "127.0.0.1", port: 0, backlog: 4096 }, () => {
  console.error(`listening on 127.0.0.1:${server.address().port}`);
});
