import { live } from "./live.js";

const $ = (id) => document.getElementById(id);
const items = new Map(); // id to its row
let version = 0; // of the list shown
let refreshing; // the timer of a fetch about to happen

// The whole state. Fetched whenever a stream begins or cannot begin, and when a version was skipped.
async function refresh() {
  try {
    const answer = await fetch("items", { signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(answer.status);
    const state = await answer.json();
    if (state.version < version) return; // an event was faster
    version = state.version;
    const now = new Set(state.items.map((item) => item.id));
    for (const id of items.keys()) if (!now.has(id)) hide(id);
    state.items.forEach(show);
    count();
  } catch {
    refreshSoon(4000);
  }
}

// Within a random time: a change tells all pages at once, and they should not all fetch at once.
function refreshSoon(within) {
  refreshing ??= setTimeout(() => {
    refreshing = undefined;
    refresh();
  }, Math.random() * within);
}

// A change counts once, whether the answer to our own request or the event tells of it first.
function change({ version: next, id, text }) {
  if (next <= version) return;
  if (next > version + 1) return refreshSoon(500);
  version = next;
  if (text === undefined) hide(id);
  else show({ id, text });
}

function show({ id, text }) {
  if (items.has(id)) return;
  const row = $("row").content.firstElementChild.cloneNode(true);
  row.querySelector("span").textContent = text; // never innerHTML: it is somebody else's text
  row.querySelector("button").ariaLabel = `Remove ${text}`;
  row.querySelector("button").onclick = () => send("DELETE", `items/${id}`);
  items.set(id, row);
  $("list").prepend(row);
  count();
}

function hide(id) {
  const row = items.get(id);
  // Who removes with the keyboard goes on from where they were.
  if (row?.contains(document.activeElement)) {
    const next = row.nextElementSibling ?? row.previousElementSibling;
    (next?.querySelector("button") ?? $("text")).focus();
  }
  row?.remove();
  items.delete(id);
  count();
}

function count() {
  $("empty").hidden = items.size > 0;
  $("clear").hidden = items.size === 0;
  $("count").textContent = items.size === 1 ? "1 item" : `${items.size} items`;
}

async function send(method, url, body) {
  const headers = { "Content-Type": "application/json" };
  try {
    const answer = await fetch(url, { method, headers, body: body && JSON.stringify(body) });
    if (answer.status === 404) return true; // another tab removed it first
    if (!answer.ok) throw new Error(answer.status);
    if (answer.status !== 204) change(await answer.json());
    return true;
  } catch {
    notice("That could not be saved. Please try again.");
    return false;
  }
}

let noticeTimer;
function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = false;
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => ($("notice").hidden = true), 12_000);
}

let countdown;
function status(state, pause) {
  clearInterval(countdown);
  $("status").dataset.state = state;
  const text = { live: "Live", lost: "Reconnecting…", offline: "Offline" }[state];
  // Read out when it changes; the seconds beside it are only to be seen.
  $("status").firstElementChild.textContent = text;
  $("next").textContent = "";
  if (state === "offline") {
    refresh(); // without a stream the page stays a little behind, but not for ever
    const end = Date.now() + pause;
    const tick = () => {
      const seconds = Math.max(0, Math.ceil((end - Date.now()) / 1000));
      $("next").textContent = `· ${seconds} s`;
    };
    tick();
    countdown = setInterval(tick, 250);
  }
}

$("add").onsubmit = async (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (text && (await send("POST", "items", { text }))) $("text").value = "";
};
$("clear").onclick = () => {
  $("question").textContent = `Remove ${items.size === 1 ? "the item" : `all ${items.size} items`}, for everybody?`;
  $("sure").showModal(); // Escape keeps them, too
};
$("keep").onclick = () => $("sure").close();
$("remove").onclick = () => {
  $("sure").close();
  $("text").focus();
  send("DELETE", "items");
};

live("events", {
  open: refresh,
  status,
  on: {
    added: (event) => change(JSON.parse(event.data)),
    removed: (event) => change(JSON.parse(event.data)),
    cleared: () => refreshSoon(500),
    message: (event) => notice(event.data),
  },
});
