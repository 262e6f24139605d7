// The browser of answers. What models wrote reaches the page as text nodes only, never as markup, so that nothing in an
// answer can act. The bits of a verdict are those of predictions.py.
const CORRECT = 1, CORRECT_FLEXIBLE = 2, PARSED = 4, TRUNCATED = 8, NOT_ASKED = -1;
const SHARED_FROM = 24; // letters; a shorter common beginning is chance

const $ = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

async function unpack(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const unzipped = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(unzipped).json();
}

if (!("DecompressionStream" in window)) {
  $("unpacking").textContent = "This browser is too old to unpack the answers: it has no DecompressionStream.";
  throw new Error("DecompressionStream is missing");
}
const { models, ids, steps, gold, texts, answers } = await unpack($("packed").textContent);
$("packed").remove(); // the unpacked answers are enough
const keys = models.map((model) => (model.form ? `${model.name} ${model.form}` : model.name));
const labels = models.map((model) => (model.form ? `${model.name}, ${model.form} in GGUF` : model.name));
const lowered = []; // texts in small letters, by problem, made when first searched
const SHOWS = {
  all: () => true,
  right: (verdict) => verdict & CORRECT,
  wrong: (verdict) => !(verdict & CORRECT),
  unparsed: (verdict) => !(verdict & PARSED),
  truncated: (verdict) => verdict & TRUNCATED,
};

// What is chosen. Everything else follows from it, and the address holds it.
const START = { a: keys[0], b: "", show: "all", differ: "", steps: "", text: "", id: "" };
const chosen = { ...START };
let shown = []; // the problems listed, as numbers from 0
let current = -1; // the problem on show

const asked = (m, i) => answers[m].text[i] !== NOT_ASKED;
const textOf = (m, i) => texts[i][answers[m].text[i]];
const modelA = () => keys.indexOf(chosen.a);
const modelB = () => keys.indexOf(chosen.b);

function word(m, i) {
  if (!asked(m, i)) return "not asked";
  const verdict = answers[m].verdict[i];
  return verdict & CORRECT ? "right" : verdict & PARSED ? "wrong" : "unparsed";
}
const SIGNS = { right: "✓", wrong: "✗", unparsed: "?", "not asked": "·" };

function fits(i) {
  const a = modelA(), b = modelB();
  if (!asked(a, i) || !SHOWS[chosen.show](answers[a].verdict[i])) return false;
  if (chosen.steps && steps[i] !== Number(chosen.steps)) return false;
  if (b >= 0 && chosen.differ) {
    if (!asked(b, i) || (answers[a].verdict[i] ^ answers[b].verdict[i]) % 2 === 0) return false;
  }
  if (!chosen.text) return true;
  const wanted = chosen.text.toLowerCase();
  lowered[i] ??= texts[i].map((text) => text.toLowerCase());
  const searched = [0, answers[a].text[i]];
  if (b >= 0 && asked(b, i)) searched.push(answers[b].text[i]);
  return ids[i].includes(wanted) || searched.some((place) => lowered[i][place].includes(wanted));
}

// The list: one light row a problem, made once; choosing hides rows, and rewrites signs where the models change.
const rows = ids.map((id, i) => {
  const signs = element("span", { className: "signs" });
  const button = element(
    "button", { type: "button", tabIndex: -1 },
    element("span", { className: "number" }, String(i + 1)),
    element("span", { className: "snippet" }, texts[i][0]), signs,
  );
  const item = element("li", { hidden: true }, button);
  item.dataset.place = i;
  return { item, button, signs, of: "" }; // of: the models whose signs it bears
});
$("list").append(...rows.map((row) => row.item));

function list() {
  shown = [];
  const pair = [modelA(), modelB()].filter((m) => m >= 0);
  const of = pair.join();
  rows.forEach((row, i) => {
    const fitting = fits(i);
    row.item.hidden = !fitting;
    if (!fitting) return;
    shown.push(i);
    if (row.of === of) return;
    row.of = of;
    const words = pair.map((m) => word(m, i));
    const told = words.map((one) => element("b", { className: one.replace(" ", "-") }, SIGNS[one]));
    row.signs.replaceChildren(...told);
    const said = pair.map((m, k) => `${labels[m]} ${words[k]}`).join(", ");
    row.button.setAttribute("aria-label", `Problem ${i + 1}, ${said}: ${texts[i][0]}`);
  });
  const whole = answers[modelA()].text.filter((place) => place !== NOT_ASKED).length;
  $("count").textContent = `${shown.length.toLocaleString("en")} of ${whole.toLocaleString("en")} problems.`;
}

function choose(i, { focus = false } = {}) {
  show(i);
  if (focus) rows[i].button.focus({ preventScroll: true });
  remember();
}

function show(i) {
  if (current >= 0) {
    rows[current].button.removeAttribute("aria-current");
    rows[current].button.tabIndex = -1;
  }
  current = i;
  chosen.id = i < 0 ? "" : ids[i];
  if (i >= 0) {
    const { button, item } = rows[i];
    button.setAttribute("aria-current", "true");
    button.tabIndex = 0;
    // The list scrolls, never the page: a reader further up stays there.
    const scroll = $("list"), top = item.offsetTop, lowest = top + item.offsetHeight - scroll.clientHeight;
    if (top < scroll.scrollTop) scroll.scrollTop = top;
    else if (lowest > scroll.scrollTop) scroll.scrollTop = lowest;
  }
  tell();
}

function move(by) {
  const at = shown.indexOf(current);
  const next = shown[Math.min(shown.length - 1, Math.max(0, at + by))];
  if (next !== undefined) choose(next, { focus: true });
}

// One problem: question, gold solution, the answers side by side, and how every model did.
function tell() {
  if (current < 0) {
    $("detail").replaceChildren(element("p", {}, "No problem fits. Choose other answers or another text."));
    return;
  }
  const i = current, at = shown.indexOf(i);
  const step = (by, text) => {
    const button = element("button", { type: "button", disabled: shown[at + by] === undefined }, text);
    button.dataset.by = by;
    button.addEventListener("click", () => {
      choose(shown[at + by]);
      $("detail").querySelector(`[data-by="${by}"]`).focus({ preventScroll: true }); // the button was made anew
    });
    return button;
  };
  const others = [...models.keys()].filter((m) => !models[m].form && asked(m, i));
  $("detail").replaceChildren(
    element("div", { className: "bar-top" },
      element("h3", {}, `Problem ${i + 1}`),
      element("span", { className: "about" }, `${ids[i]}, ${steps[i]} ${steps[i] === 1 ? "step" : "steps"}`),
      step(-1, "Previous"), step(1, "Next")),
    element("p", { className: "question" }, texts[i][0]),
    element("section", { className: "card gold" },
      element("header", {}, element("h4", {}, "gold solution"), element("span", { className: "verdict" }, gold[i])),
      element("pre", {}, texts[i][1])),
    element("div", { className: "cards" }, ...cards(i)),
    element("p", { className: "others" }, "Every model on this problem: ", ...others.map((m) => chip(m, i))),
  );
}

function cards(i) {
  const pair = [modelA(), modelB()].filter((m) => m >= 0);
  const whole = pair.map((m) => (asked(m, i) ? textOf(m, i) : ""));
  let same = 0; // letters with which both answers begin
  while (whole[1] && same < whole[0].length && whole[0][same] === whole[1][same]) same++;
  const equal = whole.length === 2 && whole[0] === whole[1];
  return pair.map((m, k) => {
    const card = element("section", { className: `card ${models[m].hue}` });
    card.dataset.model = keys[m];
    card.append(element("header", {}, element("h4", {}, named(m)), verdictOf(m, i)));
    if (!asked(m, i)) return card;
    const pale = !equal && same >= SHARED_FROM ? same : 0;
    card.append(
      element("pre", {}, element("span", { className: "same" }, whole[k].slice(0, pale)), whole[k].slice(pale)),
      element("p", { className: "about" }, about(m, i) + (equal && k === 1 ? ", the same text as beside it" : "")),
    );
    return card;
  });
}

function named(m) {
  const swatch = element("i", { className: models[m].form ? "swatch square" : "swatch" });
  return element("span", { className: `model ${models[m].hue}` }, swatch, labels[m]);
}

function verdictOf(m, i) {
  const found = word(m, i);
  const answer = answers[m].declared[i];
  let told = found;
  if (found === "wrong") told = `wrong: ${answer}`;
  if (found === "unparsed") told = answer === null ? "nothing declared" : `no number: ${answer}`;
  return element("span", { className: `verdict ${found.replace(" ", "-")}` }, `${SIGNS[found]} ${told}`);
}

function about(m, i) {
  const verdict = answers[m].verdict[i];
  const ending = verdict & TRUNCATED ? "cut at the limit" : `finish reason ${answers[m].finish[i]}`;
  return `last number ${verdict & CORRECT_FLEXIBLE ? "right" : "wrong"}, ${answers[m].tokens[i]} tokens, ${ending}`;
}

function chip(m, i) {
  const found = word(m, i);
  const isShown = m === modelA() || m === modelB();
  const sign = element("b", { className: found }, SIGNS[found]);
  const chip = element("button", { type: "button", className: "chip" }, named(m), sign);
  chip.dataset.model = keys[m];
  chip.setAttribute("aria-pressed", String(isShown));
  chip.setAttribute("aria-label", `${labels[m]}: ${found}; show it beside`);
  chip.addEventListener("click", () => {
    if (m === modelA()) return;
    change("b", chosen.b === keys[m] ? "" : keys[m]);
    $("detail").querySelector(`.chip[data-model="${CSS.escape(keys[m])}"]`).focus(); // the chips were made anew
  });
  return chip;
}

// From what is chosen to the page, and from the address to what is chosen.
function update() {
  $("model-a").value = chosen.a;
  $("model-b").value = chosen.b;
  $("step-count").value = chosen.steps;
  if ($("query").value !== chosen.text) $("query").value = chosen.text;
  $("differ").disabled = !chosen.b;
  $("differ").checked = Boolean(chosen.b && chosen.differ);
  const { verdict, text } = answers[modelA()];
  for (const input of document.querySelectorAll("#show input")) {
    input.checked = input.value === chosen.show;
    const count = verdict.filter((one, i) => text[i] !== NOT_ASKED && SHOWS[input.value](one)).length;
    input.parentElement.querySelector("b").textContent = count.toLocaleString("en");
  }
  list();
  const wanted = ids.indexOf(chosen.id);
  show(shown.includes(wanted) ? wanted : shown[0] ?? -1);
}

function change(name, value) {
  chosen[name] = value;
  if (chosen.a === chosen.b) chosen.b = "";
  update();
  remember();
}

function remember() {
  const kept = Object.entries(chosen).filter(([name, value]) => value !== START[name]);
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
}

function recall() {
  if (!location.hash.includes("=")) return false; // a section's name, or nothing
  const found = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const valid = {
    a: keys.includes(found.a), b: keys.includes(found.b) && found.b !== found.a, show: found.show in SHOWS,
    differ: found.differ === "1", steps: steps.includes(Number(found.steps)), text: true, id: ids.includes(found.id),
  };
  for (const name in START) chosen[name] = found[name] !== undefined && valid[name] ? found[name] : START[name];
  return true;
}

for (const [name, select] of [["a", $("model-a")], ["b", $("model-b")]]) {
  const groups = [["merged models", (model) => !model.form], ["GGUF forms", (model) => model.form]];
  for (const [label, belongs] of groups) {
    const members = [...models.keys()].filter((m) => belongs(models[m]));
    const options = members.map((m) => element("option", { value: keys[m] }, labels[m]));
    if (options.length) select.append(element("optgroup", { label }, ...options));
  }
  select.addEventListener("change", () => change(name, select.value));
}
const counts = [...new Set(steps)].sort((a, b) => a - b);
$("step-count").append(...counts.map((count) => element("option", { value: count }, String(count))));
$("step-count").addEventListener("change", () => change("steps", $("step-count").value));
$("query").addEventListener("input", () => change("text", $("query").value));
$("differ").addEventListener("change", () => change("differ", $("differ").checked ? "1" : ""));
$("show").addEventListener("change", (event) => change("show", event.target.value));
$("list").addEventListener("click", (event) => {
  // The row, not its button: a row that has just come into sight may not have its inside yet.
  const row = event.target.closest("li");
  if (row) choose(Number(row.dataset.place), { focus: true });
});
const MOVES = {
  ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity,
};
$("list").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in MOVES)) return;
  event.preventDefault();
  move(MOVES[event.key]);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.closest("input, select, textarea")) {
    event.preventDefault();
    $("query").focus();
  } else if (event.key === "Escape" && event.target === $("query") && current >= 0) {
    event.preventDefault(); // which would empty the field
    rows[current].button.focus();
  }
});
window.addEventListener("hashchange", () => { if (recall()) update(); });

$("browser").hidden = false;
const linked = recall();
update();
$("unpacking").remove();
if (linked) $("answers").scrollIntoView();
performance.mark("answers-ready"); // read by benchmarks/report_page.py
