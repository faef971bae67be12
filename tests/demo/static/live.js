// Keeps one EventSource alive for as long as the page lives.
//
// live("events", {
//   open() {},              // a stream has begun: fetch your state, for events may have been missed
//   status(text, pause) {}, // "live", "lost" (the browser reconnects) or "offline" (this does,
//                           // after `pause` milliseconds)
//   on: { name(event) {} }, // your events by name; "message" for those without one
// });
export function live(url, { open, status, on }) {
  let failures = 0;

  function connect() {
    const source = new EventSource(url);
    source.onopen = () => {
      failures = 0;
      status("live");
      open();
    };
    source.onerror = () => {
      // After a lost connection the browser reconnects by itself, to `url` and not to what that
      // redirected to: the backend hands out a new token. It gives up after any answer but 200
      // (401, 503, a proxy's 502), and Firefox also where nobody listens at that moment. Then the
      // page has to begin anew: after a pause that doubles, and that differs from page to page so
      // that not all come back at once.
      if (source.readyState !== EventSource.CLOSED) return status("lost");
      const pause = Math.min(1000 * 2 ** failures++, 30_000) * (0.5 + Math.random() / 2);
      status("offline", pause);
      setTimeout(connect, pause);
    };
    for (const [name, handler] of Object.entries(on)) source.addEventListener(name, handler);
  }

  connect();
}
