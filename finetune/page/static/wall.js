// The wall of images: only the rows in view are in the document, and captions are edited in a dialog.
import { MaskBrush } from "./mask.js";

const page = document.getElementById("wall-page");
const wall = document.getElementById("wall");
const editor = document.getElementById("editor");
const get = (id) => document.getElementById(id);
const folder = page.dataset.folder;

const BLOCK = 120; // images that one request asks for
const TILE_HEIGHT = 256;
const TILE_WIDTH = 208;
const TALLEST = 15_000_000; // pixels that every browser scrolls

let total = 0;
let blocks = new Map(); // number of a block -> promise of its tiles
let filter = { find: "", show: "all" };
let shown = new Map(); // place -> element
let focused = 0;

async function ask(path, fields, posted = false) {
  const words = new URLSearchParams({ folder, ...fields });
  const options = { headers: { accept: "application/json" } };
  const answer = posted
    ? await fetch(path, { ...options, method: "POST", body: words })
    : await fetch(`${path}?${words}`, options);
  const body = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(body.error), { status: answer.status, body });
  return body;
}

function say(text, failed = false) {
  get("said").textContent = text;
  get("said").className = failed ? "error" : "quiet";
}

const guarded = (action) => async (...words) => {
  try {
    await action(...words);
  } catch (error) {
    say(error.message, true);
  }
};

const source = (tile, small) =>
  `/images/file?${new URLSearchParams({ folder, name: tile.name, v: tile.version })}${small ? "&small" : ""}`;

function block(number) {
  if (!blocks.has(number)) {
    const asked = ask("/images/tiles", { ...filter, first: number * BLOCK, count: BLOCK });
    blocks.set(number, asked.then((answer) => answer.tiles));
  }
  return blocks.get(number);
}

const tileAt = async (place) => (await block(Math.floor(place / BLOCK)))[place % BLOCK];

const columns = () => Math.max(wall.clientWidth < 300 ? 1 : 2, Math.floor(wall.clientWidth / TILE_WIDTH));

function layout() {
  const across = columns();
  const rows = Math.min(Math.ceil(total / across), Math.floor(TALLEST / TILE_HEIGHT));
  wall.style.height = `${rows * TILE_HEIGHT}px`;
  const top = -wall.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor(top / TILE_HEIGHT) - 1) * across;
  const last = Math.min(Math.ceil((top + window.innerHeight) / TILE_HEIGHT) + 1, rows) * across;
  const wanted = new Set();
  for (let place = first; place < Math.min(last, total); place++) wanted.add(place);
  if (document.activeElement?.parentElement === wall) wanted.add(focused);
  for (const [place, element] of shown) {
    if (!wanted.has(place)) {
      element.remove();
      shown.delete(place);
    }
  }
  for (const place of wanted) {
    if (!shown.has(place)) shown.set(place, element(place));
    const style = shown.get(place).style;
    style.left = `${((place % across) * 100) / across}%`;
    style.top = `${Math.floor(place / across) * TILE_HEIGHT}px`;
    style.width = `${100 / across}%`;
  }
}

function element(place) {
  const button = document.createElement("button");
  button.className = "tile";
  button.dataset.place = place;
  button.tabIndex = place === focused ? 0 : -1;
  wall.append(button);
  fill(button, place);
  return button;
}

const fill = guarded(async (button, place) => {
  const tile = await tileAt(place);
  if (!tile || !button.isConnected) return;
  const image = new Image();
  image.src = source(tile, true);
  image.alt = "";
  image.decoding = "async";
  const caption = document.createElement("span");
  caption.textContent = tile.caption || "No caption";
  caption.className = tile.caption ? "" : "quiet";
  const name = document.createElement("small");
  name.textContent = tile.problem || (tile.mask ? `${tile.name} · masked` : tile.name);
  name.className = tile.problem ? "error" : "";
  button.replaceChildren(image, caption, name);
});

async function search() {
  blocks = new Map();
  shown.forEach((element) => element.remove());
  shown = new Map();
  focused = 0;
  const answer = await ask("/images/tiles", { ...filter, first: 0, count: BLOCK });
  blocks.set(0, Promise.resolve(answer.tiles));
  total = answer.total;
  get("count").textContent = total === 1 ? "1 image" : `${total} images`;
  layout();
}

async function countTags() {
  const answer = await ask("/images/tags", {});
  const items = answer.tags.map(([tag, count]) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.textContent = `${tag} ${count}`;
    button.dataset.tag = tag;
    item.append(button);
    return item;
  });
  get("tag-counts").replaceChildren(...items);
  get("known-tags").replaceChildren(...answer.tags.map(([tag]) => Object.assign(document.createElement("option"), { value: tag })));
}

// The dialog

let open = null; // { place, tile, version, text }

async function edit(place) {
  const tile = await tileAt(place);
  if (!tile) return;
  focused = place;
  if (filter.show === "left out") {
    await ask("/images/put-back", { name: tile.name }, true);
    say(`${tile.name} is back`);
    return search();
  }
  const answer = await ask("/images/caption", { name: tile.name, resolution: get("resolution").value });
  open = { place, tile, version: answer.version, text: answer.text, seen: answer.seen };
  get("name").textContent = `${tile.name} (${place + 1} of ${total})`;
  get("whole").src = source(tile, false);
  get("text").value = answer.text;
  get("where").textContent = answer.version ? answer.file : `Will be written to ${answer.file}`;
  problem(answer.tile.problem);
  show(answer.seen);
  showBrush(false);
  if (!editor.open) editor.showModal();
  get("text").focus();
}

function show(seen) {
  get("crop").hidden = !seen;
  get("seen").textContent = "";
  if (!seen) return;
  const [across, down] = seen.shares;
  Object.assign(get("crop").style, {
    width: `${100 * across}%`, height: `${100 * down}%`, left: `${50 - 50 * across}%`, top: `${50 - 50 * down}%`,
  });
  const note = seen.note ? `; it is ${seen.note}` : "";
  get("seen").textContent = `${seen.size.join(" x ")} pixels, trained at ${seen.bucket.join(" x ")}${note}.`;
}

// Masks

const brush = new MaskBrush(get("mask"), get("brush-size"), get("erase"));

function showBrush(painting) {
  ["mask", "brush", "mask-note"].forEach((id) => (get(id).hidden = !painting));
  get("paint").hidden = painting || !open?.seen;
  get("paint").textContent = open?.tile.mask ? "Edit the mask" : "Paint a mask";
  get("crop").hidden = painting || !open?.seen;
}

get("paint").onclick = guarded(async () => {
  const mask = open.tile.mask;
  await brush.open(open.seen.size, mask && `${source({ name: mask, version: Date.now() })}`);
  showBrush(true);
});
const writeMask = (png) => guarded(async () => {
  const { tile, place } = open;
  try {
    Object.assign(tile, (await ask("/images/mask", { name: tile.name, png: png() }, true)).tile);
  } catch (error) {
    return problem(error.message);
  }
  brush.changed = false;
  problem("");
  say(tile.mask ? `${tile.mask} is saved` : "The mask is deleted");
  if (shown.has(place)) fill(shown.get(place), place);
  showBrush(false);
});
get("save-mask").onclick = writeMask(() => brush.png());
get("delete-mask").onclick = writeMask(() => "");

function problem(text, conflict = false) {
  get("problem").textContent = text;
  get("conflict").hidden = !conflict;
}

// Returns whether the text is saved, so that moving on loses nothing. One after the other: each has the version of the last.
let saving = Promise.resolve();
const save = () => (saving = saving.then(saveNow));

async function saveNow() {
  const text = get("text").value;
  if (open && brush.changed) {
    problem("Save or delete the mask first");
    return false;
  }
  if (!open || text === open.text) return true;
  try {
    const answer = await ask("/images/caption", { name: open.tile.name, text, version: open.version }, true);
    open = { ...open, version: answer.version, text };
    Object.assign(open.tile, answer.tile);
    if (shown.has(open.place)) fill(shown.get(open.place), open.place);
    problem("");
    say(`${answer.file} is saved`);
    return true;
  } catch (error) {
    if (error.status === 409) open.theirs = error.body;
    problem(error.status === 409 ? `${error.message}. The file says: ${error.body.text}` : error.message, error.status === 409);
    return false;
  }
}

const move = guarded(async (by) => {
  const place = open.place + by;
  if ((await save()) && place >= 0 && place < total) await edit(place);
});

get("previous").onclick = () => move(-1);
get("next").onclick = () => move(1);
get("save").onclick = () => move(1);
get("mine").onclick = guarded(() => {
  open.version = open.theirs.version;
  return save();
});
get("theirs").onclick = () => {
  Object.assign(open, { version: open.theirs.version, text: open.theirs.text });
  get("text").value = open.text;
  problem("");
};
get("leave-out").onclick = guarded(async () => {
  const { tile, place } = open;
  try {
    await ask("/images/leave-out", { name: tile.name }, true);
  } catch (error) {
    return problem(error.message);
  }
  open = null;
  await search();
  say(`${tile.name} is left out; “Left out” shows it again`);
  if (total) await edit(Math.min(place, total - 1));
  else editor.close();
});
get("resolution").onchange = guarded(async () => {
  show((await ask("/images/caption", { name: open.tile.name, resolution: get("resolution").value })).seen);
});
editor.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.altKey && step) {
    event.preventDefault();
    move(step);
  } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    move(1);
  }
});
const close = guarded(async () => {
  if (await save()) editor.close();
});
editor.addEventListener("cancel", (event) => {
  event.preventDefault();
  close();
});
editor.querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  close();
});
editor.addEventListener("close", () => {
  open = null;
  shown.get(focused)?.focus();
});
window.addEventListener("beforeunload", (event) => {
  if (open && get("text").value !== open.text) event.preventDefault();
});

// The wall by mouse and keyboard

wall.addEventListener("click", (event) => {
  const tile = event.target.closest(".tile");
  if (tile) guarded(edit)(Number(tile.dataset.place));
});
wall.addEventListener("keydown", (event) => {
  const across = columns();
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across, Home: -total, End: total }[event.key];
  if (!step) return;
  event.preventDefault();
  focused = Math.min(total - 1, Math.max(0, focused + step));
  const top = Math.floor(focused / across) * TILE_HEIGHT + wall.getBoundingClientRect().top;
  if (top < 0 || top + TILE_HEIGHT > window.innerHeight) window.scrollBy(0, top - window.innerHeight / 3);
  layout();
  shown.forEach((element, place) => (element.tabIndex = place === focused ? 0 : -1));
  shown.get(focused)?.focus({ preventScroll: true });
});
let asked = false;
const soon = () => {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    layout();
  });
};
window.addEventListener("scroll", soon, { passive: true });
window.addEventListener("resize", soon);

// Search and tags

let typing;
get("filter").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(guarded(async () => {
    filter = Object.fromEntries(new FormData(get("filter")));
    await search();
  }), 200);
});
get("filter").addEventListener("submit", (event) => event.preventDefault());
get("tags").elements.action.onchange = (event) => {
  get("new-tag").hidden = event.target.value !== "replace";
};
get("tags").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded(async () => {
    const fields = Object.fromEntries(new FormData(get("tags")));
    const answer = await ask("/images/tags", { ...filter, ...fields }, true);
    say(`${answer.changed} of ${answer.of} captions changed`);
    await Promise.all([search(), countTags()]);
  })();
});
get("undo").onclick = guarded(async () => {
  const answer = await ask("/images/undo", {}, true);
  say(`${answer.changed} captions are as before`);
  await Promise.all([search(), countTags()]);
});
get("check").onclick = guarded(async (event) => {
  event.target.disabled = true;
  say("Looking at every image…");
  try {
    const answer = await ask("/images/check", { resolution: get("resolution").value }, true);
    if (answer.images) get("filter").elements.show.value = "problems";
    filter = Object.fromEntries(new FormData(get("filter")));
    await search();
    say(`Found: ${answer.text}`);
  } finally {
    event.target.disabled = false;
  }
});
get("tag-counts").addEventListener("click", (event) => {
  const tag = event.target.closest("button")?.dataset.tag;
  if (tag === undefined) return;
  get("filter").elements.find.value = `tag:${tag}`;
  get("filter").dispatchEvent(new Event("input"));
});

guarded(async () => Promise.all([search(), countTags()]))();
