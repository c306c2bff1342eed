"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const named = all("[data-name]");

  // Pointing at a mechanism anywhere dims the others in every chart.
  const point = (name) => {
    for (const part of named)
      if (part.closest(".chart")) part.classList.toggle("dim", name !== null && part.dataset.name !== name);
  };
  for (const part of named) {
    part.addEventListener("pointerenter", () => point(part.dataset.name));
    part.addEventListener("pointerleave", () => point(null));
    part.addEventListener("focus", () => point(part.dataset.name));
    part.addEventListener("blur", () => point(null));
  }

  // A press in the legend hides or shows a mechanism everywhere.
  for (const button of all(".legend button"))
    button.addEventListener("click", () => {
      const hide = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!hide));
      for (const part of named)
        if (part !== button && part.dataset.name === button.dataset.name) part.classList.toggle("off", hide);
    });

  // The nearest mark within reach tells its numbers.
  const tip = document.getElementById("tip");
  const REACH = 22;
  for (const chart of all(".chart, .forest")) {
    const marks = all("[data-tip]", chart).filter((mark) => mark.dataset.tip);
    chart.addEventListener("pointermove", (event) => {
      let best = null, nearest = REACH;
      for (const mark of marks) {
        if (mark.closest(".off")) continue;
        const box = mark.getBoundingClientRect();
        const far = Math.hypot(event.clientX - box.x - box.width / 2, event.clientY - box.y - box.height / 2);
        if (far < nearest) [best, nearest] = [mark, far];
      }
      tip.hidden = best === null;
      if (best === null) return;
      tip.textContent = best.dataset.tip;
      const { width, height } = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 4))}px`;
      tip.style.top = `${event.clientY > height + 20 ? event.clientY - height - 12 : event.clientY + 16}px`;
    });
    chart.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  // A press on a column's head sorts by it; cells hold their number in data-value, rows without one stay last.
  for (const table of all("table")) {
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const value = (row) => row.cells[column]?.dataset.value;
        const number = (text) => (text === "" || Number.isNaN(Number(text)) ? text : Number(text));
        const rows = all("tbody tr", table).sort((a, b) => {
          const [first, second] = [value(a), value(b)];
          if (first === undefined || second === undefined) return (first === undefined) - (second === undefined);
          const [x, y] = [number(first), number(second)];
          return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  for (const button of all(".save"))
    button.addEventListener("click", () => {
      const link = document.createElement("a");
      const data = document.getElementById("records").textContent;
      link.href = URL.createObjectURL(new Blob([data], { type: "application/json" }));
      link.download = "records.json";
      link.click();
    });

  addEventListener("beforeprint", () => { for (const part of all("details")) part.open = true; });
})();
