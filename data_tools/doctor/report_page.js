"use strict";
// Everything from the data set enters the page as textContent, never as HTML.
const report = JSON.parse(document.getElementById("report").textContent);
const levels = Object.fromEntries(report.problems.map((p) => [p.kind, p.level]));
const titles = Object.fromEntries(report.problems.map((p) => [p.kind, p.title]));
const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US");
let shown = report.samples, place = 0, opened = 0;

function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

function worst(sample) {
  const found = sample.problems.map((p) => levels[p.kind]);
  return found.includes("fault") ? "fault" : found.length ? "warning" : "";
}

function fillFilters() {
  const add = (select, value, text) => select.append(new Option(text, value));
  add(byId("source"), "", "all");
  new Set(report.samples.map((s) => s.source)).forEach((name) => add(byId("source"), name, name));
  add(byId("problem"), "", "any or none");
  add(byId("problem"), "*", "any problem");
  const present = new Set(report.samples.flatMap((s) => s.problems.map((p) => p.kind)));
  for (const kind of present) add(byId("problem"), kind, titles[kind]);
}

function applyFilters() {
  const source = byId("source").value, problem = byId("problem").value, text = byId("search").value.trim().toLowerCase();
  shown = report.samples.filter((s) =>
    (!source || s.source === source) &&
    (!problem || (problem === "*" ? s.problems.length : s.problems.some((p) => p.kind === problem))) &&
    (!text || String(s.row) === text || [s.id ?? "", s.key].some((name) => name.toLowerCase().includes(text))));
  byId("matches").textContent = `${shown.length} of ${report.samples.length} shown`;
  byId("list").replaceChildren(...shown.map(listItem));
  open(0);
}

function listItem(sample, position) {
  const item = make("button", "item"), words = make("span");
  item.type = "button";
  const picture = (sample.pictures ?? []).find((p) => p.base);
  if (picture) {
    const image = make("img");
    image.src = picture.base;
    image.alt = "";
    image.loading = "lazy";
    item.append(image);
  } else item.append(make("span", "blank", sample.id === undefined ? "✕" : "¶"));
  words.append(make("b", "", sample.id ?? sample.key), make("small", "", describe(sample)));
  item.append(words);
  if (worst(sample)) item.append(make("span", `dot ${worst(sample)}`));
  item.setAttribute("aria-label", `${sample.id ?? sample.key}, ${sample.source}`);
  item.addEventListener("click", () => open(position));
  return item;
}

function describe(sample) {
  return [sample.source, sample.length === undefined ? "" : `${number(sample.length)} tokens`].filter(Boolean).join(" · ");
}

function open(position) {
  place = position;
  const sample = shown[place], detail = byId("sample");
  byId("place").textContent = sample ? `${place + 1} of ${shown.length}` : "";
  byId("previous").disabled = place <= 0;
  byId("next").disabled = place >= shown.length - 1;
  if (sample && opened++) history.replaceState(null, "", `#row=${sample.row}`);
  detail.replaceChildren(...(sample ? parts(sample) : [make("p", "empty", "No sample matches.")]));
  const list = byId("list");
  [...list.children].forEach((item, at) => item.setAttribute("aria-current", String(at === place)));
  const item = list.children[place];
  if (item) {
    // scrollIntoView would move the page as well
    list.scrollTop = Math.min(Math.max(list.scrollTop, item.offsetTop + item.offsetHeight - list.clientHeight), item.offsetTop);
    list.scrollLeft = item.offsetLeft - list.clientWidth / 2;
  }
}

function parts(sample) {
  const found = [make("h3", "", sample.id ?? sample.key)];
  found.push(make("p", "meta", [sample.source, `row ${number(sample.row)}`, `key ${sample.key}`,
    `${sample.shard} at ${number(sample.offset)}`, `${number(Math.ceil(sample.bytes / 1000))} kB`].join(" · ")));
  for (const problem of sample.problems) {
    const flag = make("p", `flag ${levels[problem.kind]}`);
    flag.append(make("b", "", titles[problem.kind] + ": "), problem.reason);
    found.push(flag);
  }
  (sample.pictures ?? []).forEach((picture) => found.push(figure(picture)));
  if (sample.hidden_pictures) found.push(make("p", "meta", `and ${sample.hidden_pictures} pictures more`));
  if (sample.tokens) found.push(...tokens(sample));
  for (const [role, text] of sample.turns ?? []) {
    const turn = make("p", "turn");
    turn.append(make("b", "", role), text);
    found.push(turn);
  }
  return found;
}

function figure(picture) {
  const element = make("figure", "picture"), tiles = make("div", "tiles");
  const size = `${number(picture.width)} × ${number(picture.height)} px`;
  if (picture.error) {
    element.append(make("p", "empty", `${size}: ${picture.error}`));
    return element;
  }
  tiles.append(tile("base tile", picture.base, "base"));
  let text = `${size}, stored as ${picture.stored} (${number(Math.ceil(picture.bytes / 1000))} kB), ${number(picture.tokens)} image tokens`;
  if (picture.canvas) {
    const holder = tile(`grid of ${picture.rows} × ${picture.cols} tiles`, picture.canvas, "grid-tiles");
    const canvas = make("div", "canvas"), side = Math.min(150, 450 / picture.cols);
    canvas.style.width = `${side * picture.cols}px`;
    canvas.style.maxWidth = "100%";
    canvas.append(holder.querySelector("img"));
    for (let column = 1; column < picture.cols; column++) canvas.append(seam(column / picture.cols, true));
    for (let row = 1; row < picture.rows; row++) canvas.append(seam(row / picture.rows, false));
    const [left, top, right, bottom] = picture.kept, kept = make("div", "kept");
    Object.assign(kept.style, { left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * (right - left)}%`, height: `${100 * (bottom - top)}%` });
    canvas.append(kept);
    holder.append(canvas);
    tiles.append(holder);
    text += `; outlined: the ${picture.kept_patches[0]} × ${picture.kept_patches[1]} patches that are left after unpadding`;
  }
  element.append(tiles, make("figcaption", "", text));
  return element;
}

function tile(label, source, name) {
  const holder = make("div", name), image = make("img");
  image.src = source;
  image.alt = label;
  holder.append(make("small", "", label), image);
  return holder;
}

function seam(share, upright) {
  const line = make("div", "seam");
  Object.assign(line.style, upright ? { left: `${100 * share}%`, top: 0, bottom: 0, width: "1px" } : { top: `${100 * share}%`, left: 0, right: 0, height: "1px" });
  return line;
}

function tokens(sample) {
  const flow = make("div", "tokens"), readout = make("p", "readout"), legend = make("p", "legend");
  const entry = (name, text) => {
    const item = make("span");
    item.append(make("span", name, name === "chip" ? "<image>" : "abc"), " " + text);
    return item;
  };
  legend.append(entry("t learn", `supervised (${number(sample.supervised)})`), entry("t", "context"));
  if (sample.pictures.length) legend.append(entry("chip", "image tokens"));
  legend.append(make("span", "", `${number(sample.length)} tokens in all`));
  let position = 0, pieces = 0, isCut = false;
  for (const token of sample.tokens) {
    if (!isCut && position >= sample.max_length) {
      flow.append(make("span", "chip cut", `cut at ${number(sample.max_length)}`));
      isCut = true;
    }
    if (token.length === 1) {
      const ends = position + token[0], kept = Math.max(0, Math.min(token[0], sample.max_length - position));
      flow.append(make("span", "chip", `<image> × ${number(token[0])}`));
      if (kept < token[0] && !isCut) {
        flow.append(make("span", "chip cut", `cut at ${number(sample.max_length)}, after ${number(kept)} of them`));
        isCut = true;
      }
      position = ends;
      continue;
    }
    flow.append(piece(token, position++, pieces++, isCut, readout));
  }
  if (sample.hidden_tokens) flow.append(make("span", "chip", `and ${number(sample.hidden_tokens)} tokens more`));
  return [legend, flow, readout];
}

function piece([text, id, learned], position, count, isCut, readout) {
  const element = make("span", `t${learned ? " learn" : ""}${count % 2 ? " odd" : ""}${isCut ? " lost" : ""}`);
  text.split("\n").forEach((line, at) => {
    if (at) element.append(make("span", "sign", "↵"), "\n");
    element.append(line);
  });
  if (!text) element.append(make("span", "sign", "·"));
  const say = `token ${number(position)}: ${JSON.stringify(text)}, id ${id}, ${isCut ? "cut off" : learned ? "supervised" : "context"}`;
  element.title = say;
  element.addEventListener("click", () => {
    document.querySelectorAll(".picked").forEach((other) => other.classList.remove("picked"));
    element.classList.add("picked");
    readout.textContent = say;
  });
  return element;
}

function step(by) {
  const next = place + by;
  if (next >= 0 && next < shown.length) open(next);
}

fillFilters();
const asked = report.samples.findIndex((s) => location.hash === `#row=${s.row}`);
applyFilters();
if (asked > 0) open(asked);
["source", "problem"].forEach((id) => byId(id).addEventListener("change", applyFilters));
byId("search").addEventListener("input", applyFilters);
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
document.querySelectorAll("[data-show]").forEach((button) => button.addEventListener("click", () => {
  byId("problem").value = button.dataset.show;
  byId("source").value = byId("search").value = "";
  applyFilters();
  byId("browser").scrollIntoView();
}));
document.addEventListener("keydown", (event) => {
  const typing = ["INPUT", "SELECT"].includes(event.target.tagName);
  if (event.key === "Escape" && typing) event.target.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowRight" || event.key === "j") step(1);
  else if (event.key === "ArrowLeft" || event.key === "k") step(-1);
  else if (event.key === "/") { event.preventDefault(); byId("search").focus(); }
});
