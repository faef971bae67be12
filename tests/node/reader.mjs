// Prints what the npm package `eventsource` makes of a stream, a line of JSON for each event:
// node reader.mjs URL [EVENT NAME…]
import { EventSource } from "eventsource";

const [url, ...names] = process.argv.slice(2);
const source = new EventSource(url);
setInterval(() => {}, 60_000); // the package's timer for reconnecting keeps no process alive
const print = (line) => console.log(JSON.stringify(line));
source.onopen = () => print({ type: "open" });
source.onerror = (error) =>
  print({ type: "error", code: error.code, closed: source.readyState === EventSource.CLOSED });
for (const name of ["message", ...names]) {
  source.addEventListener(name, ({ type, data }) => print({ type, data }));
}
