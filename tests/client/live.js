// Keeps a page live: one stream for all tabs of a browser, begun anew whenever it ends.
//
// live("/events", {
//   open() {},              // events may have been missed until now: fetch your state
//   status(text, pause) {}, // "live"; "lost", and "offline" where that goes on: the next attempt
//                           // is after `pause` milliseconds
//   on: { name(event) {} }, // your events by name ("message": without one): event.data, event.type
//   resume: false,          // whether your backend passes `last_event_id` of its query on to the
//                           // server's; then what was missed is sent, or an `open` follows
// });
//
// One tab holds a lock and the stream, and passes events on to the others, which lifts HTTP/1.1's
// limit of six connections. When it is closed or crashes, the browser gives the lock to the next.
// Where a browser has no Web Locks (pages without HTTPS, but for localhost) each tab has a stream.
//
// The server's heartbeats are comments, which no page sees: that a connection is dead is noticed by
// the browser (by TCP's keep-alive, after a minute or so), and here by what it tells of its network.
export function live(url, { open, status, on, resume = false }) {
  const BEAT = 5_000; // milliseconds: a tab that was put to sleep with the lock is silent
  const name = `live ${new URL(url, location.href)}`;
  const shared = "locks" in navigator && "BroadcastChannel" in window;
  const channel = shared && new BroadcastChannel(name);
  let source, timer, failures = 0; // of the tab that has the stream; the timer of its next attempt
  let state, lastId; // the last status; the id of the last event, where they have ids
  let heard = Date.now(); // when the tab that has the stream was last heard of

  function tell(message) {
    if (channel) channel.postMessage(message);
    hear(message);
  }

  function hear({ kind, args }) {
    heard = Date.now();
    if (kind === "hello" && source && state) channel.postMessage({ kind: "welcome", args: state });
    // For a tab that has just come: it hears events already, and fetches what was before.
    const joined = kind === "welcome" && !state;
    if (kind === "status" || joined) status(...(state = args));
    if (kind === "open" || joined) open();
    if (kind === "event") {
      const [type, data, id] = args;
      lastId = id || lastId;
      if (type === "stream-reset") open(); // what was missed is no longer held
      on[type]?.({ type, data });
    }
  }

  function connect() {
    const address = new URL(url, location.href);
    const resuming = resume && lastId;
    if (resuming) address.searchParams.set("last_event_id", lastId);
    timer = undefined;
    source = new EventSource(address);
    // An event of yours may be named "open" or "error": those are MessageEvents.
    source.onopen = (event) => {
      if (event instanceof MessageEvent) return;
      failures = 0;
      tell({ kind: "status", args: ["live"] });
      if (!resuming) tell({ kind: "open" });
    };
    source.onerror = (event) => event instanceof MessageEvent || begin();
    for (const type of new Set([...Object.keys(on), "stream-reset"])) {
      source.addEventListener(type, (event) => {
        if (!(event instanceof MessageEvent)) return;
        tell({ kind: "event", args: [type, event.data, event.lastEventId] });
      });
    }
  }

  // Begins anew at `url`, whatever it was. Left alone, Chromium would go to where the last redirect
  // led, with the old token; and any answer but 200 is the end for good. The pause doubles, and
  // differs from page to page, so that not all come back at once.
  function begin(longest = 30_000) {
    const pause = Math.min(1000 * 2 ** failures, longest) * (1 + Math.random());
    source.close();
    clearTimeout(timer);
    timer = setTimeout(connect, pause);
    tell({ kind: "status", args: [failures++ ? "offline" : "lost", pause] });
  }

  // The lock is held until the page is gone, or another tab took it from one that was asleep.
  function lead() {
    connect();
    return new Promise(() => {});
  }

  function join(options) {
    if (!shared) return lead();
    navigator.locks.request(name, options, lead).catch(() => {
      source.close();
      clearTimeout(timer);
      source = timer = undefined;
      join({});
    });
  }

  setInterval(() => {
    if (!source) {
      const asleep = Date.now() - heard > 4 * BEAT && document.visibilityState === "visible";
      if (asleep) join({ steal: true });
    } else {
      tell({ kind: "beat" });
      // Firefox ends a stream without a word when a page starts a download.
      if (source.readyState === EventSource.CLOSED && !timer) begin();
    }
  }, BEAT);
  addEventListener("online", () => source && begin(500));
  if (channel) channel.onmessage = (event) => hear(event.data);
  join({});
  if (channel) channel.postMessage({ kind: "hello" });
}
