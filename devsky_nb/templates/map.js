// A map of images: every image is a point on a canvas, some are thumbnails over it. It is dragged, zoomed, and a loop is
// drawn around what is wanted. What was chosen is told to Python, which answers by the traits `chosen` and `selected`.
const MARGIN = 30, NEAR = 12, CLICK = 4, MAX_ZOOM = 60;  // pixels; times
const COLOURS = {point: "#56b4e9", selected: "#e69f00", chosen: "#0072b2"};

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function render({model, el}) {
  const points = make("canvas"), over = make("canvas", {className: "devsky-over"});
  const tools = make("div", {className: "devsky-map-tools"});
  const map = make("div", {className: "devsky-map", tabIndex: 0}, points, over, tools);
  map.setAttribute("role", "group");
  el.append(map);

  let positions = new Float32Array(), buttons = [];
  let view = {zoom: 1, x: 0, y: 0};  // of the map; x and y: pixels
  let size = {width: 1, height: 1};
  let lassoing = false, loop = null, drag = null;

  const count = () => positions.length / 2;
  const wide = () => size.width - 2 * MARGIN, high = () => size.height - 2 * MARGIN;
  const onScreen = n => [view.x + MARGIN + positions[2 * n] * wide() * view.zoom,
                         view.y + MARGIN + (1 - positions[2 * n + 1]) * high() * view.zoom];

  // ---- drawing
  function fit(canvas) {
    const sharp = window.devicePixelRatio || 1;
    canvas.width = size.width * sharp;
    canvas.height = size.height * sharp;
    const pen = canvas.getContext("2d");
    pen.scale(sharp, sharp);
    return pen;
  }

  function draw() {
    const pen = fit(points), selected = new Set(model.get("selected")), chosen = model.get("chosen");
    for (let n = 0; n < count(); n++) {
      const [x, y] = onScreen(n);
      if (x < -9 || y < -9 || x > size.width + 9 || y > size.height + 9) continue;
      const kind = n === chosen ? "chosen" : selected.has(n) ? "selected" : "point";
      pen.fillStyle = COLOURS[kind];
      pen.beginPath();
      pen.arc(x, y, kind === "point" ? 3 : 5, 0, 7);
      pen.fill();
    }
    for (const button of buttons) {
      const n = Number(button.dataset.n), [x, y] = onScreen(n);
      button.style.left = `${x}px`;
      button.style.top = `${y}px`;
      button.classList.toggle("devsky-selected", selected.has(n));
      button.classList.toggle("devsky-chosen", n === chosen);
    }
  }

  function drawLoop() {
    const pen = fit(over);
    if (!loop) return;
    pen.strokeStyle = pen.fillStyle = COLOURS.selected;
    pen.lineWidth = 2;
    pen.beginPath();
    for (const [x, y] of loop) pen.lineTo(x, y);
    pen.closePath();
    pen.stroke();
    pen.globalAlpha = .15;
    pen.fill();
  }

  // ---- moving about
  function zoom(times, x = size.width / 2, y = size.height / 2) {  // what is at x, y stays there
    const next = Math.min(Math.max(view.zoom * times, 1), MAX_ZOOM), by = next / view.zoom;
    view = {zoom: next, x: x - MARGIN - (x - MARGIN - view.x) * by, y: y - MARGIN - (y - MARGIN - view.y) * by};
    move(0, 0);
  }
  function move(x, y) {
    const keep = (value, room) => Math.min(0, Math.max(value, room * (1 - view.zoom)));  // the map does not leave its frame
    view = {zoom: view.zoom, x: keep(view.x + x, wide()), y: keep(view.y + y, high())};
    draw();
  }
  function setLasso(on) {
    lassoing = on;
    map.classList.toggle("devsky-drawing", on);
    lasso.setAttribute("aria-pressed", on);
  }

  // ---- choosing
  function inside(polygon, [x, y]) {
    let within = false;
    for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
      const [ax, ay] = polygon[i], [bx, by] = polygon[j];
      if ((ay > y) !== (by > y) && x < (bx - ax) * (y - ay) / (by - ay) + ax) within = !within;
    }
    return within;
  }
  const everyPoint = () => [...Array(count()).keys()];
  const select = rows => model.send({select: rows});
  function chooseNear(x, y) {
    const distance = n => Math.hypot(onScreen(n)[0] - x, onScreen(n)[1] - y);
    const nearest = everyPoint().reduce((best, n) => distance(n) < distance(best) ? n : best, 0);
    if (count() && distance(nearest) <= NEAR) model.send({choose: nearest});
  }

  // ---- pointer, wheel and keys
  const spot = event => { const box = map.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  map.onpointerdown = event => {
    if (event.button || tools.contains(event.target)) return;
    const [x, y] = spot(event);
    drag = {x, y, moved: false};
    if (lassoing || event.shiftKey) loop = [[x, y]];
  };
  map.onpointermove = event => {
    if (!drag) return;
    const [x, y] = spot(event);
    if (!drag.moved && Math.hypot(x - drag.x, y - drag.y) < CLICK) return;
    if (!drag.moved) map.setPointerCapture(event.pointerId);
    drag.moved = true;
    if (loop) {
      loop.push([x, y]);
      drawLoop();
    } else {
      move(x - drag.x, y - drag.y);
      drag.x = x;
      drag.y = y;
    }
  };
  map.onpointerup = event => {
    if (!drag) return;
    if (loop && drag.moved) {
      const polygon = loop;
      select(everyPoint().filter(n => inside(polygon, onScreen(n))));
      setLasso(false);
    } else if (!drag.moved && !event.target.closest(".devsky-point")) chooseNear(...spot(event));
    loop = drag = null;
    drawLoop();
  };
  map.onpointercancel = () => { loop = drag = null; drawLoop(); };
  map.addEventListener("wheel", event => {  // a notebook that is scrolled past the map stays a notebook that is scrolled
    if (!event.ctrlKey && !map.contains(document.activeElement)) return;
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.25 : .8, ...spot(event));
  }, {passive: false});
  const steps = {ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60]};
  map.onkeydown = event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "+" || event.key === "=") zoom(1.5);
    else if (event.key === "-") zoom(1 / 1.5);
    else if (event.key === "0") zoom(0);
    else if (event.key === "l") setLasso(!lassoing);
    else if (event.key === "Escape") { setLasso(false); select([]); }
    else if (steps[event.key]) move(...steps[event.key]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };

  function tool(text, title, onclick) {
    const button = make("button", {type: "button", title, onclick}, text);
    button.setAttribute("aria-label", title);
    tools.append(button);
    return button;
  }
  tool("+", "Zoom in (+)", () => zoom(1.5));
  tool("−", "Zoom out (-)", () => zoom(1 / 1.5));
  tool("⤢", "Show all (0)", () => zoom(0));
  const lasso = tool("Lasso", "Draw a loop around images (L, or drag with Shift)", () => setLasso(!lassoing));
  lasso.setAttribute("aria-pressed", "false");

  // ---- what Python says
  function load() {
    const bytes = model.get("positions");
    positions = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
    for (const button of buttons) button.remove();
    buttons = model.get("thumbnails").map(([n, name, src]) => {
      const button = make("button", {type: "button", className: "devsky-point", title: name, onclick: () => drag || model.send({choose: n})},
                          make("img", {src, alt: name, draggable: false}));
      button.dataset.n = n;
      return button;
    });
    map.append(...buttons);
    map.setAttribute("aria-label", `Map of ${count()} images, alike ones near another: arrows move it, plus and minus zoom, L draws a loop`);
    draw();
  }
  const watch = new ResizeObserver(() => {
    size = {width: map.clientWidth, height: map.clientHeight};
    move(0, 0);
    drawLoop();
  });
  watch.observe(map);
  model.on("change:thumbnails", load);
  model.on("change:selected", draw);
  model.on("change:chosen", draw);
  load();
  return () => {
    watch.disconnect();
    model.off("change:thumbnails", load);
    model.off("change:selected", draw);
    model.off("change:chosen", draw);
  };
}

export default {render};
