"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const home = document.getElementById("cases");
const more = document.getElementById("more");
const form = document.getElementById("filters");
const kept = new Set(data.kept);
const STEP = 15; // cards that are added at once
let shown = []; // places of the cards that pass the filters
let first = 0, stop = 0; // of those, which stand on the page
let current = -1;

// Everything from the data becomes text, never markup.
function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === "class") made.className = value;
    else if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// -- filters
const filters = {};
function choice(name, label, values) {
  const select = element("select", { "aria-label": label });
  for (const [value, text] of values) select.append(element("option", { value }, text));
  filters[name] = select;
  if (values.length > 1) form.append(select);
}
function box(name, label) {
  filters[name] = element("input", { type: "checkbox" });
  form.append(element("label", {}, filters[name], " " + label));
}
function unique(values) { return [...new Set(values)].filter((value) => value !== ""); }
function counted(n) { return n.toLocaleString("en") + (n === 1 ? " case" : " cases"); }
const milestones = unique(data.cards.flatMap((card) => card.answers.map((a) => a.edits))).sort((a, b) => b - a);
filters.text = element("input", { type: "search", placeholder: "search", "aria-label": "Search the cases" });
form.append(filters.text);
choice("run", "Run", data.runs.map((name, i) => [i, name]));
choice("edits", "After how many edits", [["", "after all edits"], ...milestones.slice(1).map((n) => [n, `after ${n}`])]);
choice("probe", "Probe", [["", "all probes"], ...data.probes.map((name) => [name, name])]);
choice("kind", "Type", [["", "all types"], ...unique(data.cards.map((card) => card.kind)).map((kind) => [kind, kind])]);
if (data.probes.length) {
  box("wrong", "wrong only");
  box("changed", "changed only");
}
const count = element("span", { id: "count", role: "status" });
form.append(count);
form.hidden = data.cards.length === 0;

function answersOf(card) {
  if (!filters.edits.value) return card.answers[card.answers.length - 1];
  return card.answers.find((answers) => answers.edits === Number(filters.edits.value));
}
function rowsOf(card) { // places of the questions that pass
  const answers = answersOf(card);
  return [...card.questions.keys()].filter((i) => {
    const question = card.questions[i];
    return (!filters.probe.value || question.probe === filters.probe.value) &&
      (!filters.wrong.checked || answers.right[i] === false) &&
      (!filters.changed.checked || answers.after[i] !== question.before);
  });
}
const texts = []; // of cards, made when they are searched
function textOf(card, i) {
  if (texts[i] === undefined) {
    const words = [card.title, card.kind, ...card.notes];
    for (const q of card.questions) words.push(q.prompt, q.target, q.before);
    for (const answers of card.answers) words.push(...answers.after);
    texts[i] = words.join("\n").toLowerCase();
  }
  return texts[i];
}
function passes(card, i) {
  if (data.runs.length > 1 && card.run !== Number(filters.run.value)) return false;
  if (filters.kind.value && card.kind !== filters.kind.value) return false;
  const wanted = filters.text.value.trim().toLowerCase();
  if (wanted && !textOf(card, i).includes(wanted)) return false;
  if (!data.probes.length) return true;
  if (answersOf(card) === undefined) return false;
  const some = filters.probe.value || filters.wrong.checked || filters.changed.checked;
  return !some || rowsOf(card).length > 0;
}
function apply() {
  shown = [...data.cards.keys()].filter((i) => passes(data.cards[i], i));
  const all = data.cards.filter((card) => data.runs.length < 2 || card.run === Number(filters.run.value));
  count.textContent = shown.length === all.length ? counted(all.length) :
    `${shown.length.toLocaleString("en")} of ${counted(all.length)}`;
  current = -1;
  start(0);
}

// -- cards
function picture(place, background, words, wide) {
  if (place < 0) return null;
  const made = element("img", { src: data.pictures[place], alt: words, loading: "lazy" });
  if (background) made.style.background = background;
  if (wide) made.title = words;
  return made;
}
function mark(right) {
  if (right === null) return "";
  return element("span", { class: right ? "good" : "bad" }, right ? "✓" : "✗",
    element("span", { class: "none" }, right ? "right" : "wrong"));
}
function cell(label, words, style = "") {
  return element("td", { "data-label": label, class: style }, words ?? "");
}
const FIRED = { right: "its own", other: "another", none: "none" };
function row(card, answers, i) {
  const q = card.questions[i], right = answers.right[i];
  const look = right === null ? "" : right ? "good" : "bad";
  const seen = picture(q.picture, q.background, q.prompt, true);
  return element("tr", {}, element("td", { class: "mark" }, mark(right)),
    element("td", { class: "pic" }, seen ?? ""), element("td", { class: "probe" }, q.probe),
    cell("asked", q.prompt), cell("wanted", kept.has(q.probe) ? "as before" : q.target), cell("before", q.before),
    cell("after", answers.after[i], look), ...(answers.fired.length ? [cell("edit", FIRED[answers.fired[i]])] : []));
}
function asked(card) {
  const answers = answersOf(card);
  const names = ["", "", "probe", "asked", "wanted", "before", "after", ...(answers.fired.length ? ["edit"] : [])];
  const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
  const rows = rowsOf(card).map((i) => row(card, answers, i));
  return element("table", { class: "asked" }, element("thead", {}, head), element("tbody", {}, ...rows));
}
function chips(card) {
  const answers = card.questions.length ? answersOf(card) : null;
  if (!answers || answers.right[0] === null) return [];
  const known = answers.right.filter((right) => right !== null);
  const good = known.filter((right) => right).length;
  const look = (right) => "chip " + (right ? "good" : "bad");
  return [
    element("span", { class: look(answers.right[0]) }, answers.right[0] ? "✓ edit holds" : "✗ edit does not hold"),
    element("span", { class: look(good === known.length) }, `${good} of ${known.length} as wanted`),
  ];
}
function build(i) {
  const card = data.cards[i], id = `case-${i + 1}`;
  const top = element("div", { class: "top" }, element("a", { href: "#" + id }, `#${i + 1}`),
    element("h3", {}, card.title), card.kind ? element("span", { class: "chip" }, card.kind) : null, ...chips(card));
  const made = element("article", { class: "card", id, tabIndex: -1 }, top,
    ...card.notes.map((note) => element("p", {}, note)));
  if (card.questions.length) {
    const q = card.questions[0];
    made.append(element("div", { class: "body" }, picture(q.picture, q.background, q.prompt), asked(card)));
  }
  const groups = card.groups.map(([caption, places]) => element("figure", {}, element("figcaption", {}, caption),
    ...places.map((place) => picture(place, "", `${card.title}: ${caption}`))));
  if (groups.length) made.append(element("div", { class: "groups" }, ...groups));
  return made;
}
function start(place) { // show the cards from a place on
  first = stop = place;
  home.replaceChildren();
  if (first) {
    const back = element("button", { type: "button" }, "earlier cases");
    back.onclick = () => start(0);
    home.append(back);
  }
  extend();
}
function extend(most = STEP) {
  const end = Math.min(shown.length, stop + most);
  home.append(...shown.slice(stop, end).map(build));
  stop = end;
}
function go(place) {
  if (place < 0 || place >= shown.length) return;
  if (place < first || place >= stop + STEP) start(place);
  else if (place >= stop) extend();
  current = place;
  const card = document.getElementById(`case-${shown[place] + 1}`);
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "start" });
}
function follow() {
  const found = /^#case-(\d+)$/.exec(location.hash);
  if (!found || !data.cards[found[1] - 1]) return;
  const wanted = found[1] - 1;
  if (!shown.includes(wanted)) {
    form.reset();
    filters.run.value = data.cards[wanted].run;
    apply();
  }
  go(shown.indexOf(wanted));
}

// -- light and dark, keys, paper
function theme(name) { root.dataset.theme = name; }
function turn() { theme(root.dataset.theme === "dark" ? "light" : "dark"); }
const system = matchMedia("(prefers-color-scheme: dark)");
theme(system.matches ? "dark" : "light");
system.addEventListener("change", () => theme(system.matches ? "dark" : "light"));
document.getElementById("theme").onclick = turn;
function flip(name) {
  if (filters[name]) {
    filters[name].checked = !filters[name].checked;
    apply();
  }
}
const KEYS = { j: () => go(current + 1), k: () => go(current - 1), "/": () => filters.text.focus(),
  w: () => flip("wrong"), c: () => flip("changed"), t: turn };
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.activeElement.blur();
  if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|SELECT/.test(event.target.tagName)) return;
  if (KEYS[event.key]) {
    event.preventDefault();
    KEYS[event.key]();
  }
});
form.addEventListener("input", apply);
form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("hashchange", follow);
addEventListener("beforeprint", () => extend(shown.length));
new IntersectionObserver((seen) => { if (seen[0].isIntersecting) extend(); }, { rootMargin: "900px" }).observe(more);
apply();
follow();
