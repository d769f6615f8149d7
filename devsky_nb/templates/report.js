"use strict";
// The list of all images: searched, shown a part at a time, enlarged, copied, downloaded. Everything that it says stands in
// this page as JSON; text goes into the page as text, never as HTML. Without this script the page shows the same, unsorted.
const {kinds, images, total} = JSON.parse(document.getElementById("images-data").textContent);
const READY = 0;  // the first of `kinds`
const STEP = {pictures: 48, rows: 100};  // shown at a time

const byId = id => document.getElementById(id);
const count = n => n.toLocaleString("en");
const pictures = new Map();  // position of an image: its thumbnail
for (const button of document.querySelectorAll("button[data-image]"))
  pictures.set(Number(button.dataset.image), button.querySelector("img").src);

const entries = images.map(([id, label, path, of, note], index) =>
  ({index, id, label, path, of, note, words: [id, label, path, note].join("\n").toLowerCase()}));
let found = entries;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const badge = kind => make("span", {className: `badge ${["good", "warn", "bad", "warn", "warn", "bad"][kind]}`}, kinds[kind]);
const name = entry => String(entry.id);
const file = entry => entry.path.split(/[\\/]/).pop();

function card(entry) {
  const image = make("img", {src: pictures.get(entry.index), alt: entry.label ? `${name(entry)}, labelled ${entry.label}` : name(entry)});
  const caption = make("figcaption", {}, make("b", {className: "lines", title: name(entry)}, name(entry)));
  if (entry.label) caption.append(make("span", {className: "label"}, entry.label));
  caption.append(...entry.of.filter(kind => kind !== READY).map(badge));
  const open = make("button", {type: "button", className: "zoom", title: "Enlarge", onclick: () => show(entry)}, image);
  return make("li", {className: "box"}, make("figure", {}, open, caption));
}

function row(entry) {
  const open = make("button", {type: "button", className: "link", onclick: () => show(entry)}, name(entry));
  return make("tr", {}, make("th", {scope: "row"}, open), make("td", {}, entry.label),
              make("td", {}, ...entry.of.map(badge)), make("td", {}, entry.note || file(entry)));
}

// A part of a list at a time: the button below it brings the next.
function fill(part, wanted, element) {
  const more = byId(`more-${part}`);
  let shown = 0;
  function next() {
    byId(part).append(...wanted.slice(shown, shown + STEP[part]).map(element));
    shown = Math.min(shown + STEP[part], wanted.length);
    more.hidden = shown === wanted.length;
    more.textContent = `Show more: ${count(wanted.length - shown)} ${part === "pictures" ? "with a thumbnail" : "in the list"}`;
  }
  more.onclick = next;
  byId(part).replaceChildren();
  next();
}

function search() {
  const words = byId("words").value.toLowerCase().split(/\s+/).filter(Boolean);
  const kind = byId("kind").value, label = byId("label").value;
  found = entries.filter(entry => (kind === "" || entry.of.includes(Number(kind))) && (label === "" || entry.label === label)
                                  && words.every(word => entry.words.includes(word)));
  const plain = found.filter(entry => !pictures.has(entry.index));
  fill("pictures", found.filter(entry => pictures.has(entry.index)), card);
  fill("rows", plain, row);
  byId("table").hidden = plain.length === 0;
  byId("copy").disabled = found.length === 0;
  byId("copy").textContent = `Copy ${count(found.length)} ${found.length === 1 ? "id" : "ids"}`;
  byId("said").textContent = found.length ? `${count(found.length)} of ${count(entries.length)} images` : "No image is like that: search for less.";
}

// ---- one image, enlarged
const dialog = byId("one");
let current = null;

function show(entry) {
  current = entry;
  const src = pictures.get(entry.index), place = found.indexOf(entry);
  byId("one-image").hidden = !src;
  if (src) byId("one-image").src = src;
  byId("one-image").alt = name(entry);
  byId("one-none").hidden = Boolean(src);
  byId("one-name").textContent = name(entry);
  byId("one-kinds").replaceChildren(...entry.of.map(badge));
  byId("one-about").replaceChildren();
  for (const [term, text] of [["label", entry.label], ["finding", entry.note], ["file", entry.path]])
    if (text) byId("one-about").append(make("dt", {}, term), make("dd", {}, text));
  byId("before").disabled = place <= 0;
  byId("after").disabled = place < 0 || place === found.length - 1;
  if (!dialog.open) dialog.showModal();
}

function go(step) {
  const place = found.indexOf(current) + step;
  if (found.includes(current) && found[place]) show(found[place]);
}

byId("before").onclick = () => go(-1);
byId("after").onclick = () => go(1);
byId("close").onclick = () => dialog.close();
byId("copy-one").onclick = () => copy([current], byId("copy-one"));
dialog.onclick = event => { if (event.target === dialog) dialog.close(); };  // beside it
dialog.onkeydown = event => {
  if (event.key === "ArrowLeft") go(-1);
  if (event.key === "ArrowRight") go(1);
};

// ---- taking something along
async function copy(chosen, button) {
  const text = chosen.map(name).join("\n"), before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => { if (button.textContent === "Copied") button.textContent = before; }, 1500);
  } catch {  // a browser that forbids it: the text is selected, to be copied by hand
    byId("by-hand").hidden = false;
    byId("by-hand-text").value = text;
    byId("by-hand-text").select();
  }
}

function download(filename, type, text) {
  const address = URL.createObjectURL(new Blob([text], {type}));
  make("a", {href: address, download: filename}).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}

const accepted = () => entries.filter(entry => entry.of.includes(READY)).map(({index, id, path, label, note}) => ({index, id, path, label, finding: note}));
const quoted = value => /[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value);

byId("csv").onclick = () => {
  const lines = [["index", "id", "path", "label", "finding"], ...accepted().map(Object.values)].map(line => line.map(quoted).join(","));
  download("accepted.csv", "text/csv", lines.join("\r\n") + "\r\n");
};
byId("json").onclick = () => download("accepted.json", "application/json", JSON.stringify(accepted(), null, 1) + "\n");
byId("copy").onclick = () => copy(found, byId("copy"));

// ---- start
byId("kind").append(make("option", {value: ""}, `all (${count(entries.length)})`));
kinds.forEach((kind, number) => {
  const some = entries.filter(entry => entry.of.includes(number)).length;
  if (some) byId("kind").append(make("option", {value: number}, `${kind} (${count(some)})`));
});
const labels = [...new Set(entries.map(entry => entry.label).filter(Boolean))].sort();
byId("label").append(make("option", {value: ""}, `all (${count(labels.length)})`), ...labels.slice(0, 500).map(label => make("option", {value: label}, label)));
byId("label").closest("label").hidden = labels.length < 2;
for (const control of ["words", "kind", "label"]) byId(control).oninput = search;
byId("tools").onsubmit = event => event.preventDefault();
for (const button of document.querySelectorAll("button[data-image]")) {  // of the findings above the list
  const entry = entries[Number(button.dataset.image)];
  button.disabled = !entry;
  button.onclick = () => show(entry);
}
for (const link of document.querySelectorAll("a[data-kind]"))
  link.onclick = () => {
    byId("words").value = byId("label").value = "";
    byId("kind").value = link.dataset.kind;
    search();
  };
byId("csv").disabled = byId("json").disabled = entries.length < total;  // half a list of what was accepted would be a wrong one
byId("tools").hidden = false;
search();
