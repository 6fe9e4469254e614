// What the page is made of: elements, pictures as the model sees them, prompts, messages in passing.

export const byId = (id) => document.getElementById(id);

// An element of a class with what is in it; texts stay texts, whatever they spell.
export function make(tag, name = "", ...inside) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...inside.filter((part) => part !== null && part !== undefined));
  return element;
}

export function button(text, action, name = "") {
  const element = make("button", name, text);
  element.type = "button";
  element.addEventListener("click", action);
  return element;
}

const count = (number) => number.toLocaleString("en");

// A picture: as given, its base tile, and its canvas with the padding dimmed and the part that is kept framed.
export function sight(picture) {
  const panels = make("div", "panels", panel(image(picture.preview, "as given"), "as given", picture.width / picture.height));
  if (picture.base) panels.append(panel(image(picture.base, "base tile"), "base tile", 1, "panel base"));
  if (picture.canvas)
    panels.append(panel(canvas(picture), `${picture.rows} × ${picture.cols} tiles`, picture.cols / picture.rows));
  const figure = make("figure", "sight", panels, make("figcaption", "", words(picture)));
  if (picture.tile_size < 100) figure.classList.add("small-tiles");
  return figure;
}

// Of a width to height that no thin picture leaves too narrow: all have about the same area.
function panel(shown, text, ratio, name = "panel") {
  const element = make("div", name, shown, make("small", "", text)), bounded = Math.min(Math.max(ratio, 0.1), 10);
  element.style.setProperty("--ratio", ratio);
  element.style.setProperty("--root", Math.sqrt(bounded));
  return element;
}

function words(picture) {
  let text = `${picture.name ? picture.name + ", " : ""}${picture.width} × ${picture.height} px`;
  if (picture.base) {
    const tiles = picture.rows * picture.cols ? `1 + ${picture.rows} × ${picture.cols} tiles` : "1 tile";
    text += `: ${tiles}, ${count(picture.tokens)} tokens`;
  }
  return picture.is_turned ? text + "; turned by its EXIF mark only, which training and model do not follow" : text;
}

function image(source, text) {
  const element = make("img");
  element.src = source;
  element.alt = text;
  return element;
}

function canvas(picture) {
  const frame = make("div", "canvas", image(picture.canvas, "tiles of the canvas"));
  const place = (name, left, top, right, bottom) => {
    if (right <= left || bottom <= top) return;
    const area = make("i", name);
    Object.assign(area.style, {
      left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * (right - left)}%`, height: `${100 * (bottom - top)}%`,
    });
    frame.append(area);
  };
  const [left, top, right, bottom] = picture.kept;
  place("pad", 0, 0, 1, top);
  place("pad", 0, bottom, 1, 1);
  place("pad", 0, top, left, bottom);
  place("pad", right, top, 1, bottom);
  for (let col = 1; col < picture.cols; col++) line(frame, { left: `${(100 * col) / picture.cols}%`, width: "1px", height: "100%" });
  for (let row = 1; row < picture.rows; row++) line(frame, { top: `${(100 * row) / picture.rows}%`, height: "1px", width: "100%" });
  place("kept", left, top, right, bottom);
  return frame;
}

function line(frame, style) {
  const element = make("i");
  Object.assign(element.style, { left: 0, top: 0, ...style });
  frame.append(element);
}

// The prompt's exact text: special tokens coloured, a picture's tokens counted.
export function promptText(parts) {
  let pictures = 0;
  return parts.map(([kind, value]) =>
    kind === "text" ? value
      : kind === "mark" ? make("span", "mark", value)
        : make("span", "picture", `picture ${++pictures}: ${count(value)} tokens`));
}

// A message in passing, which goes by itself and can be put away.
export function toast(text, { isNews = false } = {}) {
  const element = make("div", isNews ? "toast news" : "toast", make("span", "", text));
  const close = button("✕", () => element.remove());
  close.setAttribute("aria-label", "Close");
  element.append(close);
  byId("toasts").append(element);
  setTimeout(() => element.remove(), isNews ? 6000 : 15000);
}

export function showLarge(picture) {
  const dialog = byId("large");
  const close = button("✕", () => dialog.close(), "close");
  close.setAttribute("aria-label", "Close");
  dialog.replaceChildren(close, sight(picture));
  dialog.showModal();
}
