// a press on a heading sorts the table by that column, a second one the other way round
const collator = new Intl.Collator(undefined, {numeric: true});  // localeCompare with options makes one at each call
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const cell = button.parentElement, body = cell.closest("table").tBodies[0], column = cell.cellIndex;
  const down = cell.ariaSort === "ascending", rows = [...body.rows].map((row) => [row.cells[column].dataset.value, row]);
  const compare = (a, b) => isNaN(a) || isNaN(b) ? collator.compare(a, b) : a - b;
  for (const other of cell.parentElement.cells) other.removeAttribute("aria-sort");
  cell.ariaSort = down ? "descending" : "ascending";
  body.append(...rows.sort(([a], [b]) => (down ? -1 : 1) * compare(a, b)).map(([, row]) => row));
});
for (const figure of document.querySelectorAll("figure.chart")) {
  const svg = figure.querySelector("svg:not(.sample)"), out = figure.querySelector(".reading");
  const marks = [...svg.querySelectorAll("[data-x]")], parts = [...svg.querySelectorAll(".series, .line.faint")];
  const belongs = (part, kind) => kind.split(" ").every((name) => part.classList.contains(name));
  // one series comes forward, the others fade
  const pick = (kind) => {
    svg.classList.toggle("picked", Boolean(kind));
    for (const part of parts) part.classList.toggle("lit", Boolean(kind) && belongs(part, kind));
  };
  // the value nearest to the pointer is read out below its chart
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
    if (!event.target.closest("[data-kind]")) pick(best && best.parentElement.getAttribute("class").match(/c\d+ d\d+/)[0]);
  };
  svg.addEventListener("pointermove", read);
  svg.addEventListener("pointerdown", read);
  svg.addEventListener("pointerleave", () => pick(null));
  // a name brings its series forward where it is pointed at or focused; a press hides and shows it
  for (const key of figure.querySelectorAll("[data-kind]")) {
    for (const name of ["pointerenter", "focus"]) key.addEventListener(name, () => pick(key.dataset.kind));
    for (const name of ["pointerleave", "blur"]) key.addEventListener(name, () => pick(null));
    key.addEventListener("click", () => {
      const shown = key.ariaPressed !== "true";
      key.ariaPressed = String(shown);
      for (const part of parts) if (belongs(part, key.dataset.kind) && !part.contains(key)) part.classList.toggle("off", !shown);
    });
    if (key.localName === "text") key.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      key.dispatchEvent(new MouseEvent("click"));
    });
  }
}
// a table that is wider than the page says where the rest of it is
const hint = () => {
  for (const box of document.querySelectorAll(".scroll")) {
    const left = box.scrollLeft > 1, right = box.scrollLeft + box.clientWidth < box.scrollWidth - 1;
    box.previousElementSibling.hidden = !left && !right;
    box.previousElementSibling.textContent = `${left ? "← " : ""}more columns${right ? " →" : ""}`;
    box.classList.toggle("wide", left || right);
  }
};
addEventListener("resize", hint);
for (const box of document.querySelectorAll(".scroll")) box.addEventListener("scroll", hint, {passive: true});
for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", hint);
// whoever prints gets everything
addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("figure details")) details.open = true; });
hint();
