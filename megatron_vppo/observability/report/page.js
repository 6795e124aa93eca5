"use strict";
// Hover and keyboard values of the charts, and the numbers over a token. The page reads the same without this script.
(() => {
  const tip = document.getElementById("tip");

  const format = (value, unit) => {
    if (value === null || value === undefined) return "–";
    const shown = unit === "fraction" ? value * 100 : value;
    const size = Math.abs(shown);
    const text = size !== 0 && (size < 1e-4 || size >= 1e7)
      ? shown.toExponential(2)
      : shown.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? 7 : 4 });
    return unit === "fraction" ? text + "%" : text;
  };

  // Text only ever enters the page as text nodes.
  const row = (label, value, color) => {
    const line = document.createElement("div");
    if (color !== undefined) {
      const mark = document.createElement("i");
      mark.style.setProperty("--c", `var(--c${color})`);
      line.append(mark);
    }
    line.append(label);
    if (value !== undefined) {
      const strong = document.createElement("b");
      strong.textContent = value;
      line.append(strong);
    }
    return line;
  };

  const showTip = (rows, x, y) => {
    tip.replaceChildren(...rows);
    tip.style.display = "block";
    const { width, height } = tip.getBoundingClientRect();
    const left = x + 14 + width > innerWidth ? x - width - 14 : x + 14;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = Math.max(4, Math.min(y + 14, innerHeight - height - 4)) + "px";
  };
  const hideTip = () => { tip.style.display = "none"; };

  for (const chart of document.querySelectorAll(".chart[tabindex]")) {
    const data = JSON.parse(chart.querySelector("script").textContent);
    const area = chart.querySelector(".area");
    const cursor = chart.querySelector(".cursor");
    let at = data.steps.length - 1;

    const show = (index, y) => {
      at = index;
      const box = area.getBoundingClientRect();
      const place = (data.steps[index] - data.low) / (data.high - data.low);
      cursor.style.left = place * 100 + "%";
      cursor.style.display = "block";
      const rows = data.series.map((s) => row(s.label, format(s.values[index], data.unit), s.color));
      if (data.total) rows.push(row("together", format(data.series.reduce((sum, s) => sum + (s.values[index] ?? 0), 0))));
      showTip([row(`Step ${data.steps[index].toLocaleString("en")}`), ...rows], box.left + place * box.width, y ?? box.top + 20);
    };
    const hide = () => { cursor.style.display = "none"; hideTip(); };

    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      const step = data.low + ((event.clientX - box.left) / box.width) * (data.high - data.low);
      let nearest = 0;
      data.steps.forEach((s, i) => { if (Math.abs(s - step) < Math.abs(data.steps[nearest] - step)) nearest = i; });
      show(nearest, event.clientY);
    });
    area.addEventListener("pointerleave", hide);
    chart.addEventListener("blur", hide);
    chart.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") hide();
      if (!move) return;
      event.preventDefault();
      show(Math.max(0, Math.min(data.steps.length - 1, cursor.style.display === "block" ? at + move : at)));
    });
  }

  for (const sample of document.querySelectorAll(".sample")) {
    const data = JSON.parse(sample.querySelector("script").textContent);
    const tokens = [...sample.querySelectorAll(".tokens > span")];
    const describe = (index) => {
      const rows = [row(`Token ${(index + 1).toLocaleString("en")}`)];
      const add = (label, name, unit) => {
        if (data[name].length > index) rows.push(row(label, format(data[name][index]) + (unit ?? "")));
      };
      add("visual dependency", "dependency", " nats");
      if (data.kept.length > index) rows.push(row("policy gradient", data.kept[index] ? "kept" : "left out"));
      add("log-prob, original image", "old_logps");
      add("log-prob, perturbed image", "masked_logps");
      add("log-prob, rollout", "rollout_logps");
      return rows;
    };
    const box = sample.querySelector(".tokens");
    box.addEventListener("pointermove", (event) => {
      const index = tokens.indexOf(event.target);
      if (index < 0) hideTip(); else showTip(describe(index), event.clientX, event.clientY);
    });
    box.addEventListener("pointerleave", hideTip);
  }
})();
