// colours and sizes are looked at when they have come to rest
const still = new CSSStyleSheet();
still.replaceSync("*, *::before, *::after { transition: none !important; animation: none !important; }");
document.adoptedStyleSheets = [still];

// What a reader would see amiss in the page as it is shown now; `inspected()` returns it in words.
globalThis.inspected = () => {
  const problems = [], root = document.documentElement;
  const say = (what, element) => problems.push(element ? `${what}: ${named(element)}` : what);
  const named = (element) => {
    const text = (element.textContent || "").trim().replace(/\s+/g, " ").slice(0, 40);
    const kind = element.getAttribute("class");
    return `<${element.localName}${kind ? ` class="${kind}"` : ""}> ${JSON.stringify(text)}`;
  };
  const color = (text) => {
    const numbers = (text.match(/-?[\d.]+(e-?\d+)?/g) || []).map(Number), unit = text.startsWith("color(") ? 1 : 255;
    return numbers.length < 3 ? [0, 0, 0, 0] : [...numbers.slice(0, 3).map((part) => part / unit), numbers[3] ?? 1];
  };
  const over = (top, below) => [...top.slice(0, 3).map((part, place) => part * top[3] + below[place] * (1 - top[3])), 1];
  const fade = (paint, opacity) => [...paint.slice(0, 3), paint[3] * opacity];
  const light = (paint) => {
    const [r, g, b] = paint.map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [light(a), light(b)].sort((first, second) => first - second);
    return (high + 0.05) / (low + 0.05);
  };
  // what is known of an element is asked for again by all that is in it
  const once = (find, known = new Map()) => (element) => {
    if (!known.has(element)) known.set(element, find(element));
    return known.get(element);
  };
  const opacity = once((element) => element ? getComputedStyle(element).opacity * opacity(element.parentElement) : 1);
  const paper = once((element) => element
    ? over(color(getComputedStyle(element).backgroundColor), paper(element.parentElement)) : [1, 1, 1, 1]);
  const areas = once((svg) => [...svg.querySelectorAll("rect")].flatMap((shape) => {
    const style = getComputedStyle(shape), paint = fade(color(style.fill), style.fillOpacity * opacity(shape));
    return style.fill === "none" ? [] : [{shape, box: shape.getBoundingClientRect(), paint}];
  }));
  // what lies below a point of a drawing: the shapes before the element that are filled there
  const below = (element, x, y) => {
    const svg = element.ownerSVGElement;
    let found = paper(svg);
    for (const {shape, box, paint} of areas(svg)) {
      if (x < box.left || x > box.right || y < box.top || y > box.bottom) continue;
      if (shape.compareDocumentPosition(element) & Node.DOCUMENT_POSITION_FOLLOWING) found = over(paint, found);
    }
    return found;
  };
  const visible = (element) => element.checkVisibility({visibilityProperty: true});

  if (root.scrollWidth > innerWidth) {
    const wide = [...document.body.querySelectorAll("*")].filter((each) => visible(each)
      && each.getBoundingClientRect().right > innerWidth + 1 && !each.closest(".scroll, pre, .formula, .md-typeset__scrollwrap"));
    say(`the page is ${root.scrollWidth} wide in a window of ${innerWidth}`, wide[0]);
  }

  // a box that hides a part of its content says so: by a hint before it or by shadows at its edges; paper does not scroll
  const paperback = matchMedia("print").matches;
  for (const box of document.querySelectorAll("body *")) {
    const hidden = box.ownerSVGElement ? 0 : box.scrollWidth - box.clientWidth;
    if (hidden < 3 || box.clientWidth < 3 || !visible(box)) continue;
    const style = getComputedStyle(box);
    if (["auto", "scroll"].includes(style.overflowX)) {
      const hint = box.previousElementSibling?.matches(".hint:not([hidden])") || style.backgroundAttachment.includes("local");
      if (paperback) say(`${hidden} pixels are not printed`, box);
      else if (!hint) say(`${hidden} pixels hidden without a hint`, box);
    } else if (["hidden", "clip"].includes(style.overflowX) && box.matches(":has(> :is(b, span, code)), :not(:has(*))")) {
      if (box.textContent.trim() && !box.title && opacity(box) > 0) say(`${hidden} pixels of text cut off`, box);
    }
  }
  // a column so narrow that its text is a ribbon
  const range = document.createRange();  // a single one: each that there is is looked at where rows are moved
  for (const cell of document.querySelectorAll("td")) {
    range.selectNodeContents(cell);
    const box = range.getBoundingClientRect(), lines = box.height / parseFloat(getComputedStyle(cell).lineHeight);
    if (visible(cell) && lines > 9 && box.width < 0.3 * innerWidth) say(`${Math.round(lines)} lines in a narrow column`, cell);
  }

  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), seen = new Set();
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || seen.has(element) || !visible(element)) continue;
    seen.add(element);
    if (element.closest("script, style, title, noscript, math annotation")) continue;
    const style = getComputedStyle(element), box = element.getBoundingClientRect();
    if (box.width < 2 || box.height < 2 || opacity(element) === 0) continue;
    const inSvg = element.ownerSVGElement;
    const ground = inSvg ? below(element, (box.left + box.right) / 2, (box.top + box.bottom) / 2) : paper(element);
    const ink = over(fade(color(inSvg ? style.fill : style.color), opacity(element)), ground);
    const zoom = inSvg ? inSvg.getBoundingClientRect().width / inSvg.viewBox.baseVal.width : 1;
    const size = parseFloat(style.fontSize) * zoom, bold = Number(style.fontWeight) >= 600;
    const least = size >= 24 || (bold && size >= 18.66) ? 3 : 4.5, measured = contrast(ink, ground);
    if (measured < least) say(`contrast ${measured.toFixed(2)} of text`, element);
    if (size < (element.closest("sup, sub") ? 7 : 8)) say(`text of ${size.toFixed(1)} pixels`, element);
  }

  for (const shape of document.querySelectorAll("figure svg :is(path, rect, circle, line, polyline)")) {
    if (!visible(shape) || shape.matches(".unseen, .hit-area")) continue;
    const style = getComputedStyle(shape), fill = color(style.fill), stroke = color(style.stroke);
    const stroked = style.stroke !== "none" && stroke[3] > 0 && parseFloat(style.strokeWidth) > 0;
    if (style.fill === "rgb(0, 0, 0)") say("a shape that no rule fills, drawn black", shape);
    if (!stroked && (style.fill === "none" || fill[3] === 0)) say("a shape that is not drawn", shape);
    if (!shape.classList.contains("line")) continue;
    if (style.fill !== "none") say("a line that is filled", shape);
    if (!stroked) say("a line without a stroke", shape);
    const least = shape.classList.contains("faint") ? 1.4 : 3;
    const ground = paper(shape.ownerSVGElement), measured = contrast(over(fade(stroke, opacity(shape)), ground), ground);
    if (measured < least) say(`contrast ${measured.toFixed(2)} of a line`, shape);
  }

  for (const svg of document.querySelectorAll("figure svg:not(.sample)")) {
    if (!visible(svg)) continue;
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map((text) => [text, text.getBoundingClientRect()]);
    for (const [text, box] of texts) {
      const out = Math.max(frame.left - box.left, box.right - frame.right, frame.top - box.top, box.bottom - frame.bottom);
      if (out > 3) say(`text cut off by ${out.toFixed(0)} pixels`, text);
    }
    for (const [place, [text, a]] of texts.entries()) for (const [other, b] of texts.slice(place + 1)) {
      const shared = Math.max(0, Math.min(a.right, b.right) - Math.max(a.left, b.left))
        * Math.max(0, Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top));
      if (shared > 0.3 * Math.min(a.width * a.height, b.width * b.height)) {
        say(`text over text ${JSON.stringify(other.textContent.slice(0, 30))}`, text);
      }
    }
  }
  return [...new Set(problems)].slice(0, 30);
};

// Curves compared with the numbers that the drawing says: those of its ticks, and those of its markers.
globalThis.curves = () => {
  const problems = [];
  let lines = 0, points = 0;
  const number = (text) => {
    const found = text.match(/^(-?[\d,]*\.?\d+(?:e[+-]?\d+)?)( %)?/i);
    return found ? Number(found[1].replaceAll(",", "")) / (found[2] ? 100 : 1) : NaN;
  };
  for (const svg of document.querySelectorAll("figure.chart > svg:has(.line)")) {
    const title = svg.getAttribute("aria-label");
    const center = (element) => { const box = element.getBBox(); return [box.x + box.width / 2, box.y + box.height / 2]; };
    const grids = [...svg.querySelectorAll("path.grid")].map((path) => path.getBBox()).filter((box) => box.width > 20);
    const ticks = [...svg.querySelectorAll('text[text-anchor="end"]')].flatMap((text) => {
      const box = text.getBBox(), y = box.y + box.height / 2;
      const grid = grids.find((each) => Math.abs(each.y - y) < 4 && box.x + box.width < each.x + 1);
      return grid && !isNaN(number(text.textContent)) ? [[number(text.textContent), grid.y]] : [];
    });
    const scales = [(value) => value, (value) => value > 0 ? Math.log(value) : NaN].map((scale) => {
      const [first, last] = [ticks[0], ticks.at(-1)];
      const at = (value) => first[1] + (scale(value) - scale(first[0])) / (scale(last[0]) - scale(first[0])) * (last[1] - first[1]);
      return ticks.length > 1 && ticks.every(([value, y]) => Math.abs(at(value) - y) < 1.5) ? at : null;
    }).filter(Boolean);
    if (!scales.length) problems.push(`${title}: ${ticks.length} ticks on no scale`);
    for (const line of svg.querySelectorAll(".line:not(.faint)")) {
      const corners = [...line.getAttribute("d").matchAll(/[ML]([\d.-]+) ([\d.-]+)/g)].map(([, x, y]) => [Number(x), Number(y)]);
      lines += corners.length > 1;
      line.corners = corners;
    }
    for (const marker of svg.querySelectorAll(".marker[data-x]")) {
      const value = number((marker.querySelector("title").textContent.split(": ").at(-1)));
      const [x, y] = center(marker), group = marker.parentElement.getAttribute("class");
      if (marker.classList.contains("edge") || isNaN(value) || !scales.length) continue;
      points += 1;
      // a triangle's middle is not its centre
      if (!scales.some((at) => Math.abs(at(value) - y) < 2.5)) problems.push(`${title}: a marker of ${value} at height ${y}`);
      const own = [...svg.querySelectorAll(".line")].filter((line) => line.parentElement.getAttribute("class") === group);
      const passed = own.some((line) => (line.corners || []).some((corner) => Math.hypot(corner[0] - x, corner[1] - y) < 2));
      if (!passed) problems.push(`${title}: no line of ${group} passes its marker of ${value}`);
    }
  }
  return {problems: [...new Set(problems)].slice(0, 20), lines, points};
};

// Where each series is drawn and nothing over it: position in the page and colour of its markers, to be compared with the picture.
globalThis.painted = () => [...document.querySelectorAll("figure.chart > svg:has(.line) .marker[data-x]:not(.unseen, .edge)")]
  .filter((marker, place, all) => {
    // the markers of a drawing follow each other
    for (let next = place + 1; all[next]?.ownerSVGElement === marker.ownerSVGElement; next += 1) {
      if (Math.hypot(all[next].dataset.x - marker.dataset.x, all[next].dataset.y - marker.dataset.y) < 7) return false;
    }
    return marker.checkVisibility();
  })
  .map((marker) => {
    const box = marker.getBoundingClientRect();
    const fill = getComputedStyle(marker).fill.match(/[\d.]+/g).slice(0, 3).map(Number);
    const figure = [...document.querySelectorAll("svg")].indexOf(marker.ownerSVGElement);
    const series = `${marker.ownerSVGElement.getAttribute("aria-label")} (${figure}), ${marker.parentElement.getAttribute("class")}`;
    return [series, (box.left + box.right) / 2 + scrollX, (box.top + box.bottom) / 2 + scrollY, fill];
  });

// Names, order and reachability, which neither size nor colours change.
globalThis.outline = () => {
  const problems = [], say = (what, element) => problems.push(`${what}: ${element.outerHTML.slice(0, 90)}`);
  const text = (element) => (element.getAttribute("aria-label") || element.textContent || element.title
    || element.querySelector("img")?.alt || "").trim();
  if (!document.documentElement.lang) problems.push("no language");
  if (!document.title) problems.push("no title");
  if (document.querySelectorAll("h1").length !== 1) problems.push(`${document.querySelectorAll("h1").length} headings of level 1`);
  if (!document.querySelector("main")) problems.push("no main");
  let level = 1;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5")) {
    if (Number(heading.localName[1]) > level + 1) say("a level of headings is left out", heading);
    level = Number(heading.localName[1]);
  }
  const names = new Set();
  for (const element of document.querySelectorAll("[id]")) {
    if (names.has(element.id)) say("an id twice", element);
    names.add(element.id);
  }
  for (const image of document.querySelectorAll("img")) if (!image.hasAttribute("alt")) say("no alt text", image);
  for (const svg of document.querySelectorAll("svg")) {
    if (!svg.getAttribute("aria-label") && !svg.closest("[aria-hidden=true], button, label, a, noscript")) say("a drawing without a name", svg);
  }
  for (const element of document.querySelectorAll("button, a[href], summary, [tabindex='0'], th")) {
    if (element.checkVisibility() && !text(element)) say("nothing to read aloud", element);
  }
  for (const link of document.querySelectorAll("a[href^='#']")) {
    const id = decodeURIComponent(link.hash.slice(1));
    if (id && !names.has(id)) say("a link to nowhere", link);
  }
  for (const element of document.querySelectorAll("button, a[href], summary, [tabindex='0']")) {
    if (!element.checkVisibility()) continue;
    element.focus({preventScroll: true});
    const style = getComputedStyle(element), ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
    if (document.activeElement !== element) say("the keyboard does not get there", element);
    else if (!ring && style.boxShadow === "none") say("focus is not shown", element);
  }
  document.activeElement?.blur();
  return [...new Set(problems)].slice(0, 20);
};

// Words that no reader of a page of Skipway should meet: values and formulas of a program, plurals of one thing.
globalThis.words = () => {
  const seen = document.querySelector("main").innerText;
  const code = [...document.querySelectorAll("pre, code, svg")].map((each) => each.textContent);
  const rules = [
    /(?<![\d.,:] ?)\b1 (?!(pass|class|loss|bias|is|has|was|plus|as|times)\b)[a-z]{2,}s\b(?!-)/g,
    /=None\b|\bNone(?=[,)\]])|^(None|NaN)$|\b(nan|undefined|lambda)\b|\btensor\(/gm, /\\(frac|cdot|sqrt|left|mathrm|[([])|\$\$/g, /\b[a-z]+_[a-z_]+\b(?![./])/g,
  ];
  return rules.flatMap((rule) => [...seen.matchAll(rule)].map(([found]) => found))
    .filter((found) => !code.some((each) => each.includes(found))).map((found) => `in the text: ${found}`);
};

// A press on a heading sorts the table by that column, a second one the other way round.
globalThis.sorted = () => {
  const problems = [];
  for (const button of document.querySelectorAll("th button")) {
    const cell = button.parentElement, body = cell.closest("table").tBodies[0];
    const keys = () => [...body.rows].map((row) => row.cells[cell.cellIndex].dataset.value);
    const numbers = keys().every((key) => key !== "" && !isNaN(key));
    button.click();
    const up = keys();
    button.click();
    const down = keys();
    const wrong = numbers && (up.some((key, place) => place && Number(up[place - 1]) > Number(key))
      || down.some((key, place) => place && Number(down[place - 1]) < Number(key)));
    if (wrong || cell.ariaSort !== "descending") problems.push(`not sorted by ${button.textContent}`);
  }
  return problems;
};
