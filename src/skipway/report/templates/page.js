// a press on a heading sorts the table by that column, a second one the other way round
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const cell = button.parentElement, body = cell.closest("table").tBodies[0], column = cell.cellIndex;
  const down = cell.ariaSort === "ascending", key = (row) => row.cells[column].dataset.value;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
  for (const other of cell.parentElement.cells) other.removeAttribute("aria-sort");
  cell.ariaSort = down ? "descending" : "ascending";
  body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * compare(key(a), key(b))));
});
// the value nearest to the pointer is read out below its chart; a press on a name hides and shows its series
for (const figure of document.querySelectorAll("figure.chart")) {
  const svg = figure.querySelector("svg[role=img]"), out = figure.querySelector(".reading");
  const marks = [...svg.querySelectorAll("[data-x]")];
  const read = (event) => {
    const box = svg.getBoundingClientRect(), unit = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * unit, y = (event.clientY - box.top) * unit;
    let best = null, least = 40 ** 2;
    for (const mark of marks) {
      if (mark.parentElement.classList.contains("off")) continue;
      const distance = (mark.dataset.x - x) ** 2 + (mark.dataset.y - y) ** 2;
      if (distance < least) [least, best] = [distance, mark];
    }
    for (const mark of marks) mark.classList.toggle("near", mark === best);
    out.textContent = best ? best.querySelector("title").textContent : "";
  };
  svg.addEventListener("pointermove", read);
  svg.addEventListener("pointerdown", read);
  for (const key of figure.querySelectorAll("button.key")) key.addEventListener("click", () => {
    const shown = key.ariaPressed !== "true", kind = "." + key.dataset.kind.split(" ").join(".");
    key.ariaPressed = String(shown);
    for (const part of svg.querySelectorAll(kind)) part.classList.toggle("off", !shown);
  });
}
// a table that is wider than the page says so
const hint = () => {
  for (const box of document.querySelectorAll(".scroll")) {
    box.previousElementSibling.hidden = box.scrollWidth <= box.clientWidth + 1;
  }
};
addEventListener("resize", hint);
for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", hint);
hint();
