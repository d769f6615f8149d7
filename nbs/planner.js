// The planner without a kernel: looks predictions up in planner-data.js (tools/planner.py) and draws them.
(() => {
  const form = document.getElementById("planner"), result = document.querySelector(".planner-result");
  const MIB = 2 ** 20 / PLANNER.unit, GIB = 1024 * MIB, PHASES = ["load", "encode", "denoise", "decode"], BUDGETS = [4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 141];
  const RANGES = { budget: BUDGETS }; // sizes, frames and batches are those of the chosen model
  const UNITS = {
    budget: (n) => `${n} GB`, size: ([width, height]) => `${width} × ${height}`,
    frames: (n) => (n === 1 ? "1 frame" : `${n} frames`), batch: (n) => `${n} ${RANGES.frames.length > 1 ? "video" : "image"}${n === 1 ? "" : "s"}`,
  };
  const CONTROLS = ["quant", "offload", "f", "t", "s"];
  const field = (name) => form.elements.namedItem(name);
  const element = (tag, attributes = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...children);
    return made;
  };
  const gib = (units) => (units >= GIB ? `${(units / GIB).toFixed(1)} GiB` : `${Math.round(units / MIB)} MiB`);
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const index = (name) => Number(field(name).value);
  const picked = (name) => RANGES[name][index(name)];

  // A configuration is a number: of PLANNER.configs for what it is, of model.configs for where its phases stand.
  const parts = (config) => PLANNER.configs[config];
  for (const config of PLANNER.configs) {
    const { quant = "16", offload = "none", vae, vae_tiling: t = false, vae_slicing: s = false } = config.options;
    Object.assign(config, { quant, offload, f: vae === "fp16-fix", t, s });
  }
  const chosen = () => ({ quant: field("quant").value, offload: field("offload").value, f: field("f").checked, t: field("t").checked, s: field("s").checked });
  const configs = (model) => Object.keys(model.configs).filter((config) => {
    const here = phases(model, config);
    return PHASES.every((phase, i) => model.configs[config][i] === null || here[phase]);
  });

  // What is held in a phase at its worst moment, by name; a column has one number for all points, or one for each batch, or one for each point.
  const at = (column, point) => (Array.isArray(column) ? column[point % column.length] : column);
  const pointOf = (model) => (index("size") * model.frames.length + index("frames")) * model.batches.length + index("batch");
  function phases(model, config) {
    const point = pointOf(model), found = {};
    PHASES.forEach((phase, i) => {
      const row = model.rows[model.configs[config][i]];
      if (!row || at(row[0], point) === null) return;
      const held = Object.fromEntries(model.networks.map((name, n) => [name, model.weights[at(row[0], point)][n]]));
      found[phase] = { ...held, tensors: at(row[1], point), workspace: at(row[2], point) };
    });
    return found;
  }
  function peak(model, config) {
    const totals = Object.entries(phases(model, config)).map(([phase, held]) => [phase, sum(Object.values(held))]);
    return totals.reduce((worst, next) => (next[1] > worst[1] ? next : worst));
  }
  const needed = (model, config) => peak(model, config)[1] * at(model.configs[config][PHASES.length], pointOf(model)); // with the margin of error

  // As PlanOption.label and plan_vram: what sets a configuration apart, and those that fit, without the ones that another beats.
  const label = (model, config) => [model.dtype, parts(config).label].filter(Boolean).join(", ");
  function plan(model, budget) {
    const before = (a, b) => { const first = a.findIndex((x, i) => x !== b[i]); return first < 0 ? 0 : a[first] - b[first]; };
    const kept = [];
    for (const config of configs(model).sort((a, b) => before(parts(a).rank, parts(b).rank))) {
      const beats = (other) => peak(model, other)[1] <= PLANNER.about * peak(model, config)[1] && parts(other).rank.every((x, i) => x <= parts(config).rank[i]);
      if (needed(model, config) <= budget && !kept.some(beats)) kept.push(config);
    }
    return kept.slice(0, 10);
  }

  // The configuration nearest to what the controls say that exists, keeping what was just changed.
  function settle(model, changed) {
    const want = chosen(), all = configs(model);
    const wanted = all.filter((c) => !(changed in want) || parts(c)[changed] === want[changed]);
    const alike = (c) => sum(CONTROLS.map((k) => parts(c)[k] === want[k]));
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
      : `Nothing fits. The least is ${label(model, smallest)}: ${gib(peak(model, smallest)[1])} at the worst moment. Make fewer or smaller ones, or take a smaller model.`;
    document.getElementById("planner-table").hidden = !found.length;
    document.querySelector("#planner-table tbody").replaceChildren(...found.map((config) => {
      const [phase, most] = peak(model, config);
      const button = element("button", { type: "button", className: "btn btn-link", textContent: label(model, config), onclick: () => update("", config) });
      const left = gib(budget - most);
      return element("tr", {}, element("th", { scope: "row" }, button), ...[gib(most), phase, left].map((textContent) => element("td", { textContent })));
    }));
  }

  function code(name, model, config) {
    const [width, height] = picked("size"), python = (value) => ({ true: "True", false: "False" })[value] ?? JSON.stringify(value);
    const options = [`"${name}"`, `dtype="${model.dtype}"`, ...Object.entries(parts(config).options).map(([key, value]) => `${key}=${python(value)}`)];
    options.push(`width=${width}, height=${height}`);
    if (model.frames.length > 1) options.push(`frames=${picked("frames")}`);
    return `estimate_vram(${[...options, `batch=${picked("batch")}`].join(", ")})`;
  }

  function setRange(name, values, value) {
    RANGES[name] = values;
    Object.assign(field(name), { min: 0, max: Math.max(values.length - 1, 0), step: 1, value });
    if (name !== "budget") field(name).disabled = values.length < 2;
  }
  function setModel(model) {
    setRange("size", model.sizes, model.own[0]);
    setRange("frames", model.frames, model.own[1]);
    setRange("batch", model.batches, Math.min(index("batch"), model.batches.length - 1));
    for (const hidden of form.querySelectorAll(".of-videos")) hidden.hidden = model.frames.length < 2;
  }
  function update(changed, config) {
    const name = field("model").value, model = PLANNER.models[name];
    if (changed === "model") setModel(model);
    config ??= settle(model, changed);
    const budget = (picked("budget") * 1e9) / PLANNER.unit, [phase, most] = peak(model, config), fits = needed(model, config) <= budget;
    show(config, configs(model));
    draw(model, config, budget);
    list(model, budget);
    document.getElementById("planner-code").textContent = code(name, model, config);
    const verdict = document.getElementById("planner-verdict"), frames = model.frames.length > 1 ? ` with ${UNITS.frames(picked("frames"))}` : "";
    verdict.className = fits ? "fits" : "fits-not";
    verdict.textContent = `${fits ? "✓ Fits" : most <= budget ? "✗ Too close" : "✗ Does not fit"}: ${name}, ${label(model, config)}, ` +
      `${UNITS.batch(picked("batch"))} of ${UNITS.size(picked("size"))}${frames} at a time. Peak ${gib(most)} in ${phase}, budget ${gib(budget)}.`;
  }

  const groups = Object.groupBy ? Object.groupBy(Object.keys(PLANNER.models), (name) => PLANNER.models[name].kind) : { models: Object.keys(PLANNER.models) };
  field("model").append(...Object.entries(groups).map(([label, names]) => element("optgroup", { label }, ...names.map((name) => new Option(name)))));
  for (const name of ["quant", "offload"]) field(name).append(...Object.entries(PLANNER[name]).map(([value, text]) => new Option(text, value)));
  setRange("budget", BUDGETS, BUDGETS.indexOf(8));
  setRange("batch", [1], 0);
  form.hidden = result.hidden = false;
  form.addEventListener("input", (event) => update(event.target.name));
  form.addEventListener("submit", (event) => event.preventDefault());
  update("model");
})();
