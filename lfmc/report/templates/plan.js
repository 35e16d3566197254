"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");

// Lines about tensors (indices), the first of each its name, as paragraphs of `box`. Many tensors
// are told together: how many are stored as what.
function tell(box, tensors) {
  const texts = tensors.length > 3 ? [together(tensors)] : tensors.map((tensor) => data.texts[tensor]);
  box.replaceChildren();
  for (const lines of texts) {
    lines.forEach((line, index) => {
      const p = document.createElement("p");
      p.textContent = line;
      if (index === 0) p.className = "name";
      box.append(p);
    });
  }
}

function together(tensors) {
  const counts = new Map();
  let nbytes = 0;
  for (const tensor of tensors) {
    const stored = data.texts[tensor][1];
    counts.set(stored, (counts.get(stored) || 0) + 1);
    nbytes += data.nbytes[tensor];
  }
  const lines = [...counts].sort((a, b) => b[1] - a[1]).map(([stored, count]) => count + " x " + stored);
  const name = data.texts[tensors[0]][0] + " and " + (tensors.length - 1) + " more";
  return [name, nbytes.toLocaleString("en") + " bytes", ...lines];
}

function showTip(event) {
  const cell = event.target.closest("[data-t]");
  tip.hidden = !cell;
  if (!cell) return;
  tell(tip, cell.dataset.t.split(" "));
  tip.style.left = "0"; // as wide as it wants to be, before it is measured
  const right = document.documentElement.clientWidth + window.scrollX - tip.offsetWidth - 8;
  const below = event.pageY + 16;
  const fits = below + tip.offsetHeight < window.scrollY + window.innerHeight;
  tip.style.left = Math.max(4, Math.min(event.pageX + 12, right)) + "px";
  tip.style.top = (fits ? below : Math.max(4, event.pageY - tip.offsetHeight - 12)) + "px";
}
document.addEventListener("pointermove", showTip);
document.addEventListener("pointerdown", showTip);

const choice = document.getElementById("choice");
if (choice && data.first !== null) {
  const search = document.getElementById("search");

  // Where a value stands on an axis of lfmc/report/plot.py: [low, high, start, end, log].
  const pixel = ([low, high, start, end, log], value) => {
    const scale = log ? Math.log : Number;
    const at = scale(Math.min(Math.max(value, low), high));
    return start + (end - start) * (at - scale(low)) / (scale(high) - scale(low));
  };
  const draw = (group, name, look) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    node.setAttribute("class", look);
    group.append(node);
    return node;
  };
  const line = (frame, group, look, points) => {
    if (!points.length) return;
    const at = points.map(([x, y]) => pixel(frame.x, x).toFixed(1) + " " + pixel(frame.y, y).toFixed(1));
    draw(group, "path", look).setAttribute("d", "M" + at.join("L"));
  };
  const dot = (frame, group, look, radius, x, y, title) => {
    const circle = draw(group, "circle", look);
    circle.setAttribute("cx", pixel(frame.x, x));
    circle.setAttribute("cy", pixel(frame.y, y));
    circle.setAttribute("r", radius);
    draw(circle, "title", "").textContent = title;
  };
  const cleared = (name) => {
    const group = document.querySelector("#plot-" + name + " .drawn");
    group.replaceChildren();
    return group;
  };

  const drawSpectrum = (known) => {
    const frame = data.frames.spectrum, group = cleared("spectrum"), floor = frame.y[0];
    const points = data.ranks[known.count].map((rank, i) => [rank, known.shares[i]]).filter((p) => p[1] >= floor);
    line(frame, group, "l-one", points);
    if (known.alpha === null) return;
    // rank = tail * (share / edge)^(1 - alpha), read for the share
    const share = (rank) => known.edge * Math.pow(rank / known.tail, -1 / (known.alpha - 1));
    const rank = (value) => known.tail * Math.pow(value / known.edge, 1 - known.alpha);
    const first = Math.max(1, rank(frame.y[1])), last = Math.min(known.tail, rank(floor));
    if (first < last) line(frame, group, "l-two", [[first, share(first)], [last, share(last)]]);
    const label = draw(group, "text", "");
    label.setAttribute("x", frame.x[2] + 10);
    label.setAttribute("y", frame.y[2] - 26);
    label.textContent = "alpha " + known.alpha.toFixed(3);
    const sub = draw(group, "text", "axis");
    sub.setAttribute("x", frame.x[2] + 10);
    sub.setAttribute("y", frame.y[2] - 10);
    sub.textContent = "tail: " + known.tail + " of " + known.count + " eigenvalues";
  };

  const drawCurve = (known, chosen) => {
    if (!data.frames.curve) return;
    const frame = data.frames.curve, group = cleared("curve");
    const sorted = [...known.curve].sort((a, b) => a[1] - b[1] || a[2] - b[2]);
    let least = Infinity;
    line(frame, group, "l-one", sorted.filter((p) => p[2] < least && ((least = p[2]), true)).map((p) => [p[1], p[2]]));
    for (const [format, bits, error, cost] of sorted) {
      const title = data.formats[format] + "; " + bits.toFixed(2) + " bits per weight, error "
        + (100 * error).toPrecision(3) + " %, " + cost.toExponential(2) + " nats per token";
      dot(frame, group, "m-other", 3, bits, error, title);
      if (format === chosen) dot(frame, group, "m-here", 7, bits, error, "chosen: " + title);
    }
  };

  const pick = (tensor) => {
    const known = data.full[tensor];
    choice.value = tensor;
    tell(document.getElementById("about"), [tensor]);
    drawSpectrum(known);
    drawCurve(known, data.chosen[tensor]);
    document.querySelectorAll(".map .picked").forEach((node) => node.remove());
    document.querySelectorAll(".map [data-t]").forEach((node) => {
      if (!node.dataset.t.split(" ").includes(String(tensor))) return;
      const ring = draw(node.parentNode, "rect", "picked");
      for (const name of ["x", "y", "width", "height"]) ring.setAttribute(name, node.getAttribute(name));
    });
  };

  const list = (words) => {
    const wanted = words.toLowerCase().split(/\s+/);
    choice.replaceChildren();
    for (const tensor of Object.keys(data.full)) {
      const name = data.texts[tensor][0];
      if (wanted.every((word) => name.toLowerCase().includes(word))) choice.add(new Option(name, tensor));
    }
  };

  search.addEventListener("input", () => {
    const before = choice.value;
    list(search.value);
    const same = [...choice.options].some((option) => option.value === before);
    if (same) choice.value = before;
    else if (choice.options.length) pick(choice.options[0].value);
  });
  choice.addEventListener("change", () => pick(choice.value));
  document.addEventListener("click", (event) => {
    const cell = event.target.closest("[data-t]");
    const tensor = cell && cell.dataset.t.split(" ").find((index) => index in data.full);
    if (!tensor) return;
    search.value = "";
    list("");
    pick(tensor);
  });
  list("");
  pick(String(data.first));
}
