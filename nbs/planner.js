// The planner without a kernel: looks predictions up in planner-data.js (tools/planner.py) and draws them.
(() => {
  const form = document.getElementById("planner"), result = document.querySelector(".planner-result");
  const MIB = 1024, GIB = 1024 ** 2, PHASES = ["load", "encode", "denoise", "decode"], BUDGETS = [4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80];
  const QUANTS = { 16: "16 bits", int8: "int8", nf4: "nf4", "nf4-dq": "nf4, double quantization" };
  const OFFLOADS = { none: "none", model: "model by model", group: "group of layers, fetched ahead", sequential: "layer by layer" };
  const RANGES = { budget: BUDGETS, size: PLANNER.sizes, batch: PLANNER.batches };
  const UNITS = { budget: (n) => `${n} GB`, size: (n) => `${n} × ${n}`, batch: (n) => (n === 1 ? "1 image" : `${n} images`) };
  const field = (name) => form.elements.namedItem(name);
  const element = (tag, attributes = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...children);
    return made;
  };
  const gib = (kib) => (kib >= GIB ? `${(kib / GIB).toFixed(1)} GiB` : `${Math.round(kib / MIB)} MiB`);
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const picked = (name) => RANGES[name][field(name).value];

  // A configuration is "quant offload decoder", as in the data.
  const parts = (config) => {
    const [quant, offload, decoder] = config.split(" ");
    return { quant, offload, f: decoder.includes("f"), t: decoder.includes("t"), s: decoder.includes("s") };
  };
  const chosen = () => ({ quant: field("quant").value, offload: field("offload").value, f: field("f").checked, t: field("t").checked, s: field("s").checked });
  const configs = (model) => Object.keys(model.ranks).filter((c) => phases(model, c).decode);

  // What is held in a phase at its worst moment, in KiB by name; a phase is missing where the grid has no such point.
  function phases(model, config) {
    const [quant, offload, decoder] = config.split(" "), way = `${quant} ${offload}`;
    const batch = Number(field("batch").value), at = field("size").value * PLANNER.batches.length + batch;
    const places = { load: [way, 0], encode: [way, batch], denoise: [way, at], decode: [`${way} ${decoder}`, at] };
    const found = {};
    for (const phase of PHASES) {
      const [key, position] = places[phase], entry = model[phase][key]?.[position];
      if (!entry) continue;
      const held = Object.fromEntries(model.networks.map((name, i) => [name, model.weights[entry[0]][i]]));
      found[phase] = { ...held, tensors: entry[1], workspace: entry[2] };
    }
    return found;
  }
  function peak(model, config) {
    const totals = Object.entries(phases(model, config)).map(([phase, held]) => [phase, sum(Object.values(held))]);
    return totals.reduce((worst, next) => (next[1] > worst[1] ? next : worst));
  }

  // As Option.label and plan_vram: what sets a configuration apart, and those that fit, without the ones that another beats.
  const label = (model, config) => {
    const p = parts(config);
    return [model.dtype, p.quant !== "16" && p.quant, p.offload !== "none" && `${p.offload} offload`, p.f && "fp16-fix VAE", p.t && "VAE tiling", p.s && "VAE slicing"].filter(Boolean).join(", ");
  };
  function plan(model, budget) {
    const order = (config) => [...model.ranks[config], peak(model, config)[1]];
    const before = (a, b) => { const at = a.findIndex((x, i) => x !== b[i]); return at < 0 ? 0 : a[at] - b[at]; };
    const kept = [];
    for (const config of configs(model).sort((a, b) => before(model.ranks[a], model.ranks[b]))) {
      const here = order(config);
      if (here[3] * (1 + PLANNER.margin) <= budget && !kept.some((other) => order(other).every((x, i) => x <= here[i]))) kept.push(config);
    }
    return kept.slice(0, 10);
  }

  // The configuration nearest to what the controls say that exists, keeping what was just changed.
  function settle(model, changed) {
    const want = chosen(), all = configs(model);
    const wanted = all.filter((c) => !(changed in want) || parts(c)[changed] === want[changed]);
    const alike = (c) => sum(Object.keys(want).map((k) => parts(c)[k] === want[k]));
    return (wanted.length ? wanted : all).reduce((best, c) => (alike(c) > alike(best) ? c : best));
  }
  function show(config, all) {
    const p = parts(config);
    for (const name of ["quant", "offload"]) {
      field(name).value = p[name];
      for (const option of field(name).options) option.disabled = !all.some((c) => parts(c)[name] === option.value);
    }
    for (const name of ["f", "t", "s"]) {
      field(name).checked = p[name];
      field(name).disabled = !all.some((c) => parts(c)[name] !== p[name]);
    }
    for (const name in RANGES) field(name).setAttribute("aria-valuetext", (field(name).nextElementSibling.value = UNITS[name](picked(name))));
  }

  function draw(model, config, budget) {
    const held = phases(model, config), [phase, most] = peak(model, config), scale = 100 / (1.08 * Math.max(budget, most));
    const colour = (name) => PLANNER.palette[name] ?? "#0072B2";
    const rows = PHASES.filter((p) => held[p]).map((p) => {
      const pieces = Object.entries(held[p]).filter(([, size]) => size > 0), total = sum(Object.values(held[p]));
      const bar = element("div", { className: "bar" }, ...pieces.map(([name, size]) => {
        const piece = element("span", { title: `${name}: ${gib(size)}` });
        piece.style.cssText = `width:${size * scale}%;background:${colour(name)}`;
        return piece;
      }));
      bar.setAttribute("role", "img");
      bar.setAttribute("aria-label", `${p}: ${gib(total)}, of it ${pieces.map(([name, size]) => `${name} ${gib(size)}`).join(", ")}`);
      const line = element("i", { className: "budget" });
      line.style.left = `${budget * scale}%`;
      bar.append(line);
      return element("div", { className: p === phase ? "row-of-bars worst" : "row-of-bars" }, element("span", { textContent: p }), bar, element("span", { textContent: gib(total) }));
    });
    document.getElementById("planner-bars").replaceChildren(...rows);
    const legend = Object.entries(held[phase]).filter(([, size]) => size > 0).map(([name, size]) => {
      const swatch = element("span", { className: "swatch" });
      swatch.style.background = colour(name);
      return element("li", {}, swatch, `${name} ${gib(size)}`);
    });
    document.getElementById("planner-legend").replaceChildren(element("li", { textContent: `In ${phase}:` }), ...legend, element("li", {}, element("span", { className: "swatch line" }), `budget ${gib(budget)}`));
  }

  function list(model, budget) {
    const found = plan(model, budget);
    const smallest = configs(model).reduce((a, b) => (peak(model, b)[1] < peak(model, a)[1] ? b : a));
    document.getElementById("planner-count").textContent = found.length
      ? `${found.length} ${found.length === 1 ? "way" : "ways"} to run it in ${UNITS.budget(picked("budget"))}. Choose one to see it above.`
      : `Nothing fits. The least is ${label(model, smallest)}: ${gib(peak(model, smallest)[1])} at the worst moment. Draw fewer or smaller images, or take a smaller model.`;
    document.getElementById("planner-table").hidden = !found.length;
    document.querySelector("#planner-table tbody").replaceChildren(...found.map((config) => {
      const [phase, most] = peak(model, config);
      const button = element("button", { type: "button", className: "btn btn-link", textContent: label(model, config), onclick: () => update("", config) });
      const left = gib(budget - most);
      return element("tr", {}, element("th", { scope: "row" }, button), ...[gib(most), phase, left].map((textContent) => element("td", { textContent })));
    }));
  }

  function code(name, config) {
    const p = parts(config), size = picked("size"), batch = picked("batch"), python = { true: "True", false: "False" };
    const options = [`"${name}"`, `dtype="${PLANNER.models[name].dtype}"`];
    if (p.quant !== "16") options.push(`quant="${p.quant}"`);
    if (p.offload !== "none") options.push(`offload="${p.offload}"`);
    if (p.f) options.push('vae="fp16-fix"');
    if (p.t) options.push(`vae_tiling=${python[p.t]}`);
    if (p.s) options.push(`vae_slicing=${python[p.s]}`);
    return `estimate_vram(${[...options, `width=${size}`, `height=${size}`, `batch=${batch}`].join(", ")})`;
  }

  function update(changed, config) {
    const name = field("model").value, model = PLANNER.models[name];
    if (changed === "model") field("size").value = PLANNER.sizes.indexOf(model.own);
    config ??= settle(model, changed);
    const budget = (picked("budget") * 1e9) / 1024, [phase, most] = peak(model, config), fits = most * (1 + PLANNER.margin) <= budget;
    show(config, configs(model));
    draw(model, config, budget);
    list(model, budget);
    document.getElementById("planner-code").textContent = code(name, config);
    const verdict = document.getElementById("planner-verdict");
    verdict.className = fits ? "fits" : "fits-not";
    verdict.textContent = `${fits ? "✓ Fits" : most <= budget ? "✗ Too close" : "✗ Does not fit"}: ${name}, ${label(model, config)}, ` +
      `${UNITS.batch(picked("batch"))} of ${UNITS.size(picked("size"))} at a time. Peak ${gib(most)} in ${phase}, budget ${gib(budget)}.`;
  }

  field("model").append(...Object.keys(PLANNER.models).map((name) => new Option(name)));
  field("quant").append(...Object.entries(QUANTS).map(([value, text]) => new Option(text, value)));
  field("offload").append(...Object.entries(OFFLOADS).map(([value, text]) => new Option(text, value)));
  for (const [name, values] of Object.entries(RANGES)) Object.assign(field(name), { min: 0, max: values.length - 1, step: 1, value: 0 });
  field("budget").value = BUDGETS.indexOf(8);
  form.hidden = result.hidden = false;
  form.addEventListener("input", (event) => update(event.target.name));
  form.addEventListener("submit", (event) => event.preventDefault());
  update("model");
})();
