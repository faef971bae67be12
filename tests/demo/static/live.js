// Keeps one EventSource alive for as long as the page lives.
//
// live("events", {
//   open() {},              // a stream has begun: fetch your state, for events may have been missed
//   status(text, pause) {}, // "live"; "lost", and "offline" where that goes on: the next attempt
//                           // is after `pause` milliseconds
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
      // Begin anew, whatever it was. Left alone, Firefox would come back to `url`, but Chromium,
      // as the standard has it, to where that redirected to, with the old token; and both give up
      // after any answer but 200 (401, 503, a proxy's 502). The pause doubles, and differs from
      // page to page so that not all come back at once.
      source.close();
      const pause = Math.min(1000 * 2 ** failures, 30_000) * (1 + Math.random());
      status(failures++ ? "offline" : "lost", pause);
      setTimeout(connect, pause);
    };
    for (const [name, handler] of Object.entries(on)) source.addEventListener(name, handler);
  }

  connect();
}
