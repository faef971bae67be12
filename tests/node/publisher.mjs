// Posts bodies one after the other on one kept connection, and prints a line of JSON for each: the
// status, or the error's code; and how many connections it took. node publisher.mjs URL BODY…
import { Agent, request } from "node:http";

const [url, ...bodies] = process.argv.slice(2);
const agent = new Agent({ keepAlive: true, maxSockets: 1 });
const ports = new Set();

function post(body) {
  return new Promise((resolve) => {
    const sent = request(url, { agent, method: "POST" }, (answer) => {
      ports.add(answer.socket.localPort);
      answer.resume().on("end", () => resolve(answer.statusCode));
    });
    sent.on("error", (error) => resolve(error.code)).end(body);
  });
}

for (const body of bodies) {
  const outcome = await post(body);
  console.log(JSON.stringify({ outcome, connections: ports.size }));
}
agent.destroy();
