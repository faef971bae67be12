// Prints what the npm package `@microsoft/fetch-event-source` makes of a stream, a line of JSON for
// each message: node fetch-reader.mjs URL
globalThis.window = globalThis; // it is made for browsers
const { fetchEventSource } = await import("@microsoft/fetch-event-source");

const print = (line) => console.log(JSON.stringify(line));
await fetchEventSource(process.argv[2], {
  openWhenHidden: true, // there is no document to be hidden
  onopen: async () => print({ type: "open" }),
  onmessage: ({ event, data }) => print({ type: event || "message", data }),
  onclose: () => print({ type: "close" }),
});
