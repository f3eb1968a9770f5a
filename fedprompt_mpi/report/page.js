// Figures: a value under the pointer, a series hidden by its name in the legend, a part enlarged by dragging.
// Tables: sorted by a column. Without this script the page has all of its content too.
"use strict";

const NEAR = 24; // pixels

const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
tip.setAttribute("role", "status");
document.body.append(tip);

function show(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - box.width - 4)) + scrollX}px`;
  tip.style.top = `${Math.max(4, y - box.height - 12) + scrollY}px`;
}

for (const svg of document.querySelectorAll("figure svg")) {
  const points = [];
  for (const title of svg.querySelectorAll(".mark title")) {
    const element = title.parentElement;
    element.dataset.tip = title.textContent;
    if (element.localName === "use") points.push(element);
    title.remove(); // else the browser shows it a second time
  }
  const hidden = new Set();
  const whole = svg.getAttribute("viewBox");
  let from = null;

  function find(event) {
    const bar = event.target.closest("[data-tip]");
    let best = null, least = NEAR;
    for (const point of points) {
      if (hidden.has(point.closest(".mark").dataset.series)) continue;
      const box = point.getBoundingClientRect();
      const away = Math.hypot(box.x + box.width / 2 - event.clientX, box.y + box.height / 2 - event.clientY);
      if (away < least) [best, least] = [point, away];
    }
    return best ?? bar;
  }

  svg.addEventListener("pointermove", (event) => {
    const found = find(event);
    if (found) show(found.dataset.tip, event.clientX, event.clientY);
    else tip.hidden = true;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });

  for (const key of svg.querySelectorAll(".key")) {
    key.addEventListener("click", () => {
      const series = key.dataset.series;
      const hide = !hidden.has(series);
      if (hide) hidden.add(series); else hidden.delete(series);
      for (const part of svg.querySelectorAll(".mark, .key")) {
        if (part.dataset.series === series) part.classList.toggle("off", hide);
      }
    });
  }

  const inside = (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return [place.x, place.y];
  };
  svg.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "mouse" && !event.target.closest(".key")) from = inside(event);
  });
  svg.addEventListener("pointerup", (event) => {
    if (!from) return;
    const [x, y] = inside(event), [x0, y0] = from;
    from = null;
    const [width, height] = [Math.abs(x - x0), Math.abs(y - y0)];
    if (width > 8 && height > 8) svg.setAttribute("viewBox", `${Math.min(x, x0)} ${Math.min(y, y0)} ${width} ${height}`);
  });
  svg.addEventListener("dblclick", () => svg.setAttribute("viewBox", whole));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    return cell === "" || isNaN(cell) ? cell : Number(cell);
  };
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [left, right] = [value(a, column), value(b, column)];
        const order = typeof left === "number" && typeof right === "number"
          ? left - right : String(left).localeCompare(String(right), "en", { numeric: true });
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
