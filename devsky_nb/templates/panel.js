// What Python cannot do for a panel in the page: keys. Each panel holds one of these, unseen.
// A key that a panel knows is told to Python. And whatever has the focus in a panel is marked, so that a notebook in
// command mode takes no key for a command (an arrow goes to the next cell, M makes the cell Markdown).
const TEXT = "textarea, [contenteditable=true], input:not([type=checkbox]):not([type=radio]):not([type=range])";

function render({model, el}) {
  const panel = () => el.closest(".devsky");
  const holds = event => event.target instanceof Element && panel()?.contains(event.target);

  function focus(event) {
    if (holds(event)) event.target.dataset.lmSuppressShortcuts = true;
  }
  function press(event) {
    if (!holds(event) || event.ctrlKey || event.metaKey || event.altKey || event.target.matches(TEXT)) return;
    const key = event.key.toLowerCase(), field = model.get("focus_keys")[key];
    if (!field && !model.get("known_keys").includes(key)) return;
    event.preventDefault();
    event.stopPropagation();
    if (field) panel().querySelector(`.${field} input`).focus();
    else model.send({key});
  }
  function receive(message) {
    if (message.focus) panel()?.focus({preventScroll: true});
  }
  document.addEventListener("focusin", focus, true);
  document.addEventListener("keydown", press, true);
  model.on("msg:custom", receive);
  requestAnimationFrame(() => { if (panel()) panel().tabIndex = -1; });  // so that a click into the panel lets it hear keys
  return () => {
    document.removeEventListener("focusin", focus, true);
    document.removeEventListener("keydown", press, true);
    model.off("msg:custom", receive);
  };
}

export default {render};
