"use strict";
(() => {
  const PER_PAGE = 24;
  const RIGHT = 50;
  const KINDS = { lost: "right → wrong", won: "wrong → right", wrong: "both wrong", right: "both right" };
  const DEFAULTS = { task: "", method: "", flip: "", category: "", text: "", order: "loss", page: "1" };

  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("filters");
  const field = (name) => form.elements.namedItem(name);
  const list = document.getElementById("found");
  const pagers = [...document.querySelectorAll(".pager")];

  const questions = data.tasks.flatMap((task) => task.ids.map((_, place) => ({ task, place })));
  const methods = data.methods.map((_, number) => number + 1); // column 0 is the base
  let found = [];
  let page = 1;

  function element(name, text = "", className = "") {
    const made = document.createElement(name);
    made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function score(question, model) {
    return question.task.scores[model][question.place];
  }

  function kind(question, chosen) {
    const right = (model) => score(question, model) >= RIGHT;
    if (right(0)) return chosen.every(right) ? "right" : "lost";
    return chosen.some(right) ? "won" : "wrong";
  }

  function loss(question, chosen) {
    return chosen.reduce((sum, model) => sum + score(question, 0) - score(question, model), 0);
  }

  function distinct(question) {
    return new Set(question.task.answers.map((column) => column[question.place])).size;
  }

  // Which texts hold the words, so that each text is searched once however many answers share it.
  let lowered = null;
  function textsWith(words) {
    lowered ??= data.texts.map((text) => text.toLowerCase());
    return lowered.map((text) => text.includes(words));
  }

  function matches(words) {
    if (!words) return () => true;
    const holds = textsWith(words);
    return ({ task, place }) =>
      holds[task.prompts[place]] ||
      holds[task.targets[place]] ||
      task.answers.some((column) => holds[column[place]]) ||
      task.pictures[place].some((picture) => holds[data.pictures[picture][0]]) ||
      task.ids[place].toLowerCase() === words;
  }

  const ORDERS = {
    loss: (chosen) => (question) => -loss(question, chosen),
    gain: (chosen) => (question) => loss(question, chosen),
    answers: () => (question) => -distinct(question),
    file: null,
  };

  function select() {
    const chosen = field("method").value === "" ? methods : [Number(field("method").value)];
    const task = field("task").value;
    const category = field("category").value === "" ? -1 : Number(field("category").value);
    const holds = matches(field("text").value.trim().toLowerCase());
    const among = questions.filter(
      (question) =>
        (task === "" || question.task === data.tasks[task]) &&
        (category < 0 || question.task.categories[question.place].includes(category)) &&
        holds(question),
    );
    const kinds = among.map((question) => kind(question, chosen));
    const counts = { lost: 0, won: 0, wrong: 0, right: 0 };
    for (const its of kinds) counts[its] += 1;
    for (const option of field("flip").options) {
      const of = option.value ? counts[option.value] : among.length;
      option.textContent = `${KINDS[option.value] ?? "all"} (${of.toLocaleString("en")})`;
    }
    const flip = field("flip").value;
    found = flip ? among.filter((_, place) => kinds[place] === flip) : among;
    const order = ORDERS[field("order").value];
    if (order) {
      const key = order(chosen);
      const ranked = found.map((question) => [key(question), question]);
      ranked.sort((a, b) => a[0] - b[0]); // stable: alike ones stay in the order of the file
      found = ranked.map(([, question]) => question);
    }
  }

  function listCategories() {
    const task = field("task").value;
    const seen = new Set((task === "" ? data.tasks : [data.tasks[task]]).flatMap((its) => its.categories.flat()));
    const named = [...seen].map((place) => [data.texts[place], place]);
    named.sort((a, b) => a[0].localeCompare(b[0], "en", { numeric: true }));
    const all = new Option("all", "");
    field("category").replaceChildren(all, ...named.map(([text, place]) => new Option(text, place)));
    field("category").disabled = named.length === 0;
  }

  function pictureOf(place) {
    const [name, uri] = data.pictures[place];
    const path = data.texts[name];
    if (!uri) return element("p", `no thumbnail of ${path}`, "pale picture none");
    const figure = element("div", "", "picture");
    const image = element("img");
    image.src = uri;
    image.alt = `picture ${path}`;
    image.title = path;
    figure.append(image);
    return figure;
  }

  function answersOf(question, chosen) {
    const shared = new Map();
    for (const model of [0, ...chosen]) {
      const answer = question.task.answers[model][question.place];
      const key = `${answer} ${score(question, model)}`;
      if (!shared.has(key)) shared.set(key, { answer, score: score(question, model), models: [] });
      shared.get(key).models.push(model);
    }
    const given = element("ul", "", "given");
    for (const { answer, score: its, models } of shared.values()) {
      const line = element("li");
      if (question.task.graded) {
        const right = its >= RIGHT;
        const mark = element("span", right ? "✓" : "✗", right ? "right" : "wrong");
        mark.setAttribute("aria-hidden", "true");
        line.append(mark, element("span", right ? "right: " : "wrong: ", "hidden"));
      }
      const text = data.texts[answer];
      if (answer < 0) line.append(element("i", "no answer"));
      else if (text === "") line.append(element("i", "an empty answer"));
      else line.append(element("span", text, "answer"));
      if (!question.task.graded || (its !== 0 && its !== 100)) line.append(element("span", ` ${(its / 100).toFixed(2)}`, "pale"));
      line.append(" ");
      models.forEach((model, place) => {
        const method = model ? data.methods[model - 1] : { name: "base", look: "base" };
        line.append(place ? ", " : "", element("span", method.name, `name-${method.look} by`));
      });
      given.append(line);
    }
    return given;
  }

  function card(question, chosen) {
    const { task, place } = question;
    const item = element("li", "", "card");
    const pictures = element("div", "", "pictures");
    pictures.append(...task.pictures[place].map(pictureOf));
    if (task.pictures[place].length) item.append(pictures);
    const categories = task.categories[place].map((text) => data.texts[text]);
    const from = element("p", "", "pale from");
    from.append(element("b", task.name), ` ${[...categories, `question ${task.ids[place]}`].join(" · ")}`);
    item.append(from);
    const prompt = data.texts[task.prompts[place]];
    if (prompt) item.append(element("p", prompt, "question"));
    const target = data.texts[task.targets[place]];
    if (target) {
      const annotated = element("p");
      annotated.append(element("span", "Annotated: ", "pale"), element("bdi", target));
      item.append(annotated);
    }
    item.append(answersOf(question, chosen));
    return item;
  }

  function show() {
    const chosen = field("method").value === "" ? methods : [Number(field("method").value)];
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    page = Math.min(Math.max(1, page), pages);
    const first = (page - 1) * PER_PAGE;
    const rows = found.slice(first, first + PER_PAGE);
    list.replaceChildren(...rows.map((question) => card(question, chosen)));
    const number = (value) => value.toLocaleString("en");
    const range = rows.length ? `${number(first + 1)} to ${number(first + rows.length)} of ` : "";
    const status = `${range}${number(found.length)} questions shown, of ${number(questions.length)} in all`;
    document.getElementById("count").textContent = status;
    for (const pager of pagers) {
      pager.querySelector(".where").textContent = `page ${number(page)} of ${number(pages)}`;
      for (const button of pager.querySelectorAll("button")) {
        button.disabled = Number(button.value) < 0 ? page === 1 : page === pages;
      }
    }
  }

  // The choice stands in the address, so that a view can be kept or sent.
  let written = "";
  function writeAddress() {
    const state = new URLSearchParams();
    const now = { ...Object.fromEntries(new FormData(form)), page: String(page) };
    now.task = now.task === "" || now.task === undefined ? "" : data.tasks[now.task].task;
    now.method = now.method === "" || now.method === undefined ? "" : data.methods[now.method - 1].name;
    now.category = now.category ? data.texts[now.category] : "";
    for (const [name, value] of Object.entries(DEFAULTS)) {
      if (now[name] && now[name] !== value) state.set(name, now[name]);
    }
    written = state.toString();
    const hash = location.hash.slice(1);
    if (written !== hash && (written || hash.includes("="))) history.replaceState(null, "", `#${written}`);
  }

  function readAddress() {
    const state = new URLSearchParams(location.hash.slice(1));
    const of = (name) => state.get(name) ?? DEFAULTS[name];
    const put = (name, place) => (field(name).value = place < 0 ? "" : String(place));
    put("task", data.tasks.findIndex((task) => task.task === of("task")));
    put("method", data.methods.findIndex((method) => method.name === of("method")) + 1 || -1);
    listCategories();
    const option = [...field("category").options].find((its) => its.value && its.textContent === of("category"));
    field("category").value = option ? option.value : "";
    field("flip").value = Object.hasOwn(KINDS, of("flip")) ? of("flip") : "";
    field("order").value = Object.hasOwn(ORDERS, of("order")) ? of("order") : DEFAULTS.order;
    field("text").value = of("text");
    page = Number.parseInt(of("page"), 10) || 1;
    select();
    show();
  }

  function change(event) {
    if (event.target.name === "task") listCategories();
    page = 1;
    select();
    show();
    writeAddress();
  }

  let waiting = 0;
  form.addEventListener("change", change);
  form.addEventListener("input", (event) => {
    if (event.target.name !== "text") return;
    clearTimeout(waiting);
    waiting = setTimeout(() => change(event), 150);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => change({ target: field("task") })));
  for (const button of document.querySelectorAll(".pager button")) {
    button.addEventListener("click", () => {
      page += Number(button.value);
      show();
      writeAddress();
      document.getElementById("h-browser").scrollIntoView();
    });
  }
  addEventListener("hashchange", () => {
    if (location.hash.slice(1) !== written) readAddress();
  });

  const copy = document.getElementById("copy");
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(data.made);
      copy.textContent = "Copied";
    } catch {
      const area = element("textarea", data.made);
      area.rows = 12;
      area.readOnly = true;
      area.setAttribute("aria-label", "how these numbers were made, as text");
      copy.replaceWith(area);
      area.select();
    }
  });

  readAddress();
  document.getElementById("browser").hidden = false;
  if (location.hash.includes("=")) document.getElementById("h-browser").scrollIntoView();
})();
