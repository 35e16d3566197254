"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");

// Show the lines of tensors (indices) as paragraphs of `box`; the first line of each is its name.
// More than 3 tensors are summarized: the number of tensors per format.
function describe(box, tensors) {
  const texts = tensors.length > 3 ? [summary(tensors)] : tensors.map((tensor) => data.texts[tensor]);
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

function summary(tensors) {
  const counts = new Map();
  let nbytes = 0;
  for (const tensor of tensors) {
    const format = data.texts[tensor][1];
    counts.set(format, (counts.get(format) || 0) + 1);
    nbytes += data.nbytes[tensor];
  }
  const lines = [...counts].sort((a, b) => b[1] - a[1]).map(([format, count]) => count + " x " + format);
  const name = data.texts[tensors[0]][0] + " and " + (tensors.length - 1) + " more";
  return [name, nbytes.toLocaleString("en") + " bytes", ...lines];
}

function showTip(event) {
  const cell = event.target.closest("[data-t]");
  tip.hidden = !cell;
  if (!cell) return;
  describe(tip, cell.dataset.t.split(" "));
  tip.style.left = "0"; // at the left edge, the tip has its natural width
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

  // The pixel of a value on an Axis of lfmc/report/plot.py: [low, high, start, end, log].
  const pixel = ([low, high, start, end, log], value) => {
    const scale = log ? Math.log : Number;
    const scaled = scale(Math.min(Math.max(value, low), high));
    return start + (end - start) * (scaled - scale(low)) / (scale(high) - scale(low));
  };
  const draw = (group, name, style) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    node.setAttribute("class", style);
    group.append(node);
    return node;
  };
  const line = (frame, group, style, points) => {
    if (!points.length) return;
    const pixels = points.map(([x, y]) => pixel(frame.x, x).toFixed(1) + " " + pixel(frame.y, y).toFixed(1));
    draw(group, "path", style).setAttribute("d", "M" + pixels.join("L"));
  };
  const dot = (frame, group, style, radius, x, y, title) => {
    const circle = draw(group, "circle", style);
    circle.setAttribute("cx", pixel(frame.x, x));
    circle.setAttribute("cy", pixel(frame.y, y));
    circle.setAttribute("r", radius);
    draw(circle, "title", "").textContent = title;
  };
  const clear = (name) => {
    const group = document.querySelector("#plot-" + name + " .drawn");
    group.replaceChildren();
    return group;
  };

  const drawSpectrum = (facts) => {
    const frame = data.frames.spectrum, group = clear("spectrum"), floor = frame.y[0];
    const points = data.ranks[facts.count].map((rank, i) => [rank, facts.shares[i]]).filter((p) => p[1] >= floor);
    line(frame, group, "l-one", points);
    if (facts.alpha === null) return;
    // rank = tail * (share / edge)^(1 - alpha), solved for the share
    const share = (rank) => facts.edge * Math.pow(rank / facts.tail, -1 / (facts.alpha - 1));
    const rank = (value) => facts.tail * Math.pow(value / facts.edge, 1 - facts.alpha);
    const first = Math.max(1, rank(frame.y[1])), last = Math.min(facts.tail, rank(floor));
    if (first < last) line(frame, group, "l-two", [[first, share(first)], [last, share(last)]]);
    const label = draw(group, "text", "");
    label.setAttribute("x", frame.x[2] + 10);
    label.setAttribute("y", frame.y[2] - 26);
    label.textContent = "alpha " + facts.alpha.toFixed(3);
    const caption = draw(group, "text", "axis");
    caption.setAttribute("x", frame.x[2] + 10);
    caption.setAttribute("y", frame.y[2] - 10);
    caption.textContent = "tail: " + facts.tail + " of " + facts.count + " eigenvalues";
  };

  const drawCurve = (facts, chosen) => {
    if (!data.frames.curve) return;
    const frame = data.frames.curve, group = clear("curve");
    const sorted = [...facts.curve].sort((a, b) => a[1] - b[1] || a[2] - b[2]);
    let smallest = Infinity; // error so far: the line is the Pareto front
    line(frame, group, "l-one", sorted.filter((p) => p[2] < smallest && ((smallest = p[2]), true)).map((p) => [p[1], p[2]]));
    for (const [format, bits, error, cost] of sorted) {
      const title = data.formats[format] + "; " + bits.toFixed(2) + " bits per weight, error "
        + (100 * error).toPrecision(3) + " %, " + cost.toExponential(2) + " nats per token";
      dot(frame, group, "m-other", 3, bits, error, title);
      if (format === chosen) dot(frame, group, "m-here", 7, bits, error, "chosen: " + title);
    }
  };

  const pick = (tensor) => {
    const facts = data.full[tensor];
    choice.value = tensor;
    describe(document.getElementById("about"), [tensor]);
    drawSpectrum(facts);
    drawCurve(facts, data.chosen[tensor]);
    document.querySelectorAll(".map .picked").forEach((node) => node.remove());
    document.querySelectorAll(".map [data-t]").forEach((node) => {
      if (!node.dataset.t.split(" ").includes(String(tensor))) return;
      const ring = draw(node.parentNode, "rect", "picked");
      for (const name of ["x", "y", "width", "height"]) ring.setAttribute(name, node.getAttribute(name));
    });
  };

  const list = (query) => {
    const words = query.toLowerCase().split(/\s+/);
    choice.replaceChildren();
    for (const tensor of Object.keys(data.full)) {
      const name = data.texts[tensor][0];
      if (words.every((word) => name.toLowerCase().includes(word))) choice.add(new Option(name, tensor));
    }
  };

  search.addEventListener("input", () => {
    const selected = choice.value;
    list(search.value);
    const isListed = [...choice.options].some((option) => option.value === selected);
    if (isListed) choice.value = selected;
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
