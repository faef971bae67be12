// Keeps a page live: one stream for all tabs of a browser, begun anew whenever it ends.
//
// live("/events", {
//   open() {},              // events may have been missed until now: fetch your state
//   status(text, pause) {}, // "live"; "lost", and "offline" where that goes on: the next attempt
//                           // is after `pause` milliseconds
//   on: { name(event) {} }, // your events by name ("message": without one): event.data, event.type
//   resume: false,          // whether your backend passes `last_event_id` of its query on to the
//                           // server's; then what was missed is sent, or an `open` follows
//   withCredentials: false, // whether your backend is of another origin and reads a cookie
// });
//
// One tab holds a lock and the stream, and passes events on to the others, which lifts HTTP/1.1's
// limit of six connections. When it is closed or crashes, the browser gives the lock to the next.
// Tabs share by address: where what is sent depends on who asks, put that into it ("/events?user=7").
// Where a browser has no Web Locks (pages without HTTPS, but for localhost) each tab has a stream.
// It lasts as long as the page, which has to be loaded anew when its user logs in or out.
//
// The server's heartbeats are comments, which no page sees: that a connection is dead is noticed by
// the browser (by TCP's keep-alive, within minutes), and here by what it tells of its network.
export function live(url, { open, status, on, resume = false, withCredentials = false }) {
  const name = `live ${new URL(url, location.href)}`;
  const types = new Set(["stream-reset", ...Object.keys(on)]); // and those of the other tabs
  let channel, asked = 0; // to the other tabs; how often the one that leads was, and gave no answer
  let source, timer, due, failures = 0; // of the tab that leads; its next attempt, and when
  let state, lastId; // the last status; the id of the last event, where they have ids
  const say = (kind) => channel?.postMessage({ kind, args: state, types: [...types] });

  function tell(kind, args) {
    channel?.postMessage({ kind, args });
    hear({ kind, args });
  }

  function hear({ kind, args, types: others = [] }) {
    for (const type of others) listen(type);
    if (kind === "hello") return source && look();
    asked = 0;
    // For a tab that has just come: it hears events already, and fetches what was before.
    const joined = kind === "welcome" && args && !state;
    if (kind === "status" || joined) status(...(state = args));
    if (kind === "open" || joined) open();
    if (kind === "event") {
      const [type, data, id] = args;
      lastId = id || lastId;
      if (type === "stream-reset") open(); // what was missed is no longer held
      on[type]?.({ type, data });
    }
  }

  function listen(type) {
    types.add(type);
    source?.addEventListener(type, pass); // the same one twice counts once
  }

  // An event of yours may be named "open" or "error": those are MessageEvents.
  function pass(event) {
    if (event instanceof MessageEvent) tell("event", [event.type, event.data, event.lastEventId]);
  }

  function connect() {
    const address = new URL(url, location.href);
    const resuming = resume && lastId;
    if (resuming) address.searchParams.set("last_event_id", lastId);
    timer = clearTimeout(timer);
    source = new EventSource(address, { withCredentials });
    source.onopen = (event) => {
      if (event instanceof MessageEvent) return;
      failures = 0;
      tell("status", ["live"]);
      if (!resuming) tell("open");
    };
    source.onerror = (event) => event instanceof MessageEvent || begin();
    types.forEach(listen);
  }

  // Begins anew at `url`, whatever it was. Left alone, Chromium would go to where the last redirect
  // led, with the old token; and any answer but 200 is the end for good. The pause doubles, and
  // differs from page to page, so that not all come back at once.
  function begin(longest = 30_000) {
    const pause = Math.min(1000 * 2 ** failures, longest) * (1 + Math.random());
    source.close();
    clearTimeout(timer);
    timer = setTimeout(connect, pause);
    due = Date.now() + pause;
    tell("status", [failures++ ? "offline" : "lost", pause]);
  }

  // The lock is held until the page is gone, or another tab takes it.
  function join(options) {
    if (!channel) return connect();
    const lead = () => (connect(), new Promise(() => {}));
    navigator.locks.request(name, options, lead).catch(() => {
      if (!source) channel = channel.close(); // not allowed here: a stream for this tab alone
      source?.close();
      source = timer = clearTimeout(timer);
      join({});
    });
  }

  // Every 5 seconds, and in a tab that nobody sees at least whenever one that is seen says "hello".
  function look() {
    if (source && timer && Date.now() > due) connect();
    // Firefox ends a stream without a word when a page starts a download.
    if (source && !timer && source.readyState === EventSource.CLOSED) begin();
    if (source) return say("welcome");
    if (document.visibilityState === "hidden") return;
    if (asked++ > 3) join({ steal: true }); // a tab that was put to sleep keeps its lock
    say("hello");
  }

  setInterval(look, 5_000);
  addEventListener("visibilitychange", look);
  addEventListener("online", () => source && begin(500));
  try {
    channel = navigator.locks && new BroadcastChannel(name);
    if (channel) channel.onmessage = (event) => hear(event.data);
  } catch {} // where a browser keeps nothing for the site, it may refuse
  join({});
  say("hello");
}
