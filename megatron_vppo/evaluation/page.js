"use strict";
// The browser of responses: a filtered list of questions, and the one that is chosen with all of its samples.
(() => {
  const browser = document.querySelector("[data-browser]");
  const data = JSON.parse(browser.querySelector("script").textContent);
  const list = browser.querySelector(".list");
  const pane = browser.querySelector(".question");
  const found = browser.querySelector(".found");
  const filter = (name) => browser.querySelector(`[name="${name}"]`);

  // Text only ever enters the page as text nodes.
  const make = (tag, className, ...children) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children);
    return element;
  };
  const mean = (responses) => responses.reduce((sum, one) => sum + one.accuracy, 0) / responses.length;
  const right = (responses) => responses.filter((one) => one.accuracy >= 0.5).length;

  const matches = {
    all: () => true,
    every: (question) => mean(question.runs[0]) === 1,
    some: (question) => mean(question.runs[0]) > 0 && mean(question.runs[0]) < 1,
    none: (question) => mean(question.runs[0]) === 0,
    better: (question) => question.runs[1].length > 0 && mean(question.runs[0]) > mean(question.runs[1]),
    worse: (question) => question.runs[1].length > 0 && mean(question.runs[0]) < mean(question.runs[1]),
  };

  const strength = (logp) => data.top > 0 ? Math.sqrt(Math.min(Math.max(-logp, 0) / data.top, 1)) : 0;

  const tokens = (response) => {
    const box = make("div", "tokens");
    response.tokens.forEach((token, index) => {
      const span = make("span", "", token === "" ? "∅" : token.replaceAll("\n", "⏎\n"));
      span.style.setProperty("--d", strength(response.logps[index]).toFixed(3));
      span.title = `token ${index + 1}: log-prob ${response.logps[index]} nats`;
      box.append(span);
    });
    const left = response.of - response.tokens.length;
    if (left > 0) box.append(make("em", "more", ` … ${left.toLocaleString("en")} more tokens`));
    return box;
  };

  const verdict = (response) => {
    const good = response.accuracy >= 0.5;
    return make("span", `verdict ${good ? "right" : "wrong"}`, good ? "✓ right" : "✗ wrong");
  };

  const responseOf = (response) => {
    const head = make("header", "", verdict(response), make("span", "", `sample ${response.sample + 1}`),
      make("span", "", `${response.of.toLocaleString("en")} tokens`));
    head.append(make("span", "vote", response.vote === null ? "no answer found" : `answered ${response.vote}`));
    if (response.truncated) head.append(make("span", "warn", "ended at the length limit"));
    if (response.error !== null) head.append(make("span", "warn", `grading failed: ${response.error}`));
    return make("div", "response", head, tokens(response));
  };

  const problemOf = (question) => {
    const paragraph = make("p", "problem");
    question.problem.split("<image>").forEach((text, index) => {
      if (index > 0) paragraph.append(make("span", "", "image"));
      paragraph.append(text);
    });
    return paragraph;
  };

  const fact = (label, text) => make("div", "", make("dt", "", label), make("dd", "", text));

  const show = (question) => {
    const facts = make("dl", "facts", fact("Ground truth", question.answer), fact("Grader", question.grader),
      ...Object.entries(question.categories).map(([name, value]) => fact(name, value)));
    const text = make("div", "", make("h3", "", `${data.benchmarks[question.benchmark]} · ${question.id}`),
      problemOf(question), facts);
    const images = make("div", "images");
    for (const source of question.images) {
      const image = make("img");
      image.src = source;
      image.alt = "image of the question";
      images.append(make("figure", "", image));
    }
    const asked = make("div", "asked", text);
    if (question.images.length) asked.append(images);
    pane.replaceChildren(asked);
    question.runs.forEach((responses, number) => {
      const mark = make("i", "mark");
      mark.style.setProperty("--c", `var(--c${(number % 8) + 1})`);
      const counts = responses.length ? `${right(responses)} of ${responses.length} right` : "not asked";
      pane.append(make("p", "run", mark, data.runs[number], make("span", "counts", counts)), ...responses.map(responseOf));
    });
  };

  const choose = (button, question) => {
    for (const other of list.querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
    button.setAttribute("aria-current", "true");
    show(question);
  };

  const entry = (question) => {
    const counts = question.runs.map((responses) => responses.length ? `${right(responses)}/${responses.length}` : "–");
    const button = make("button", "", make("span", "id", `${data.benchmarks[question.benchmark]} · ${question.id}`),
      make("span", "counts", counts.join("  ")),
      make("span", "text", question.problem.replaceAll("<image>", "").trim()));
    button.type = "button";
    button.addEventListener("click", () => choose(button, question));
    return button;
  };

  const update = () => {
    const benchmark = filter("benchmark").value;
    const wanted = filter("find").value.trim().toLowerCase();
    const kept = data.questions.filter((question) =>
      (benchmark === "all" || question.benchmark === Number(benchmark))
      && matches[filter("verdict").value](question)
      && [question.id, question.problem, question.answer].some((text) => text.toLowerCase().includes(wanted)));
    found.textContent = `${kept.length.toLocaleString("en")} of ${data.questions.length.toLocaleString("en")}`;
    const buttons = kept.map(entry);
    list.replaceChildren(...buttons.map((button) => make("li", "", button)));
    if (kept.length) choose(buttons[0], kept[0]);
    else pane.replaceChildren(make("p", "nodata", "no question of this kind on the page"));
  };

  for (const name of ["benchmark", "verdict"]) filter(name).addEventListener("change", update);
  filter("find").addEventListener("input", update);
  list.addEventListener("keydown", (event) => {
    const move = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    const next = move && event.target.closest("li")?.[move]?.querySelector("button");
    if (!next) return;
    event.preventDefault();
    next.focus();
    next.click();
  });
  update();
})();
