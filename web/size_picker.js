// Buttons in the shape of each size; a click fills width and height.
const HEIGHT = 84;

function button(width, height, choose) {
  const element = document.createElement("button");
  const unit = 30 / Math.max(width, height);
  element.type = "button";
  element.title = `${width}x${height}`;
  element.dataset.size = `${width}x${height}`;
  element.style.cssText = "background:none;border:none;padding:1px 3px;cursor:pointer;color:var(--input-text);text-align:center";
  const shape = document.createElement("div");
  shape.style.cssText = `width:${Math.round(width * unit)}px;height:${Math.round(height * unit)}px;margin:0 auto;` +
    "border:1px solid currentColor;border-radius:2px";
  const label = document.createElement("div");
  label.textContent = `${width}x${height}`;
  label.style.fontSize = "8px";
  element.append(shape, label);
  element.addEventListener("click", () => choose(width, height));
  return element;
}

function setWidget(node, name, value) {
  const widget = node.widgets.find((candidate) => candidate.name === name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value);
}

export function sizePicker(node, groups) {
  const box = document.createElement("div");
  box.className = "k5-size-picker";
  box.style.cssText = "display:flex;flex-direction:column;gap:2px;overflow:hidden";
  const bar = document.createElement("div");
  const row = document.createElement("div");
  row.style.cssText = "display:flex;flex-wrap:nowrap;align-items:flex-end;overflow-x:auto";
  const choose = (width, height) => {
    setWidget(node, "width", width);
    setWidget(node, "height", height);
    node.setDirtyCanvas(true, true);
  };
  const show = (group) => row.replaceChildren(...group.sizes.map(([width, height]) => button(width, height, choose)));
  for (const group of groups) {
    const tab = document.createElement("button");
    tab.type = "button";
    tab.textContent = group.name;
    tab.dataset.group = group.name;
    tab.style.cssText = "background:none;border:none;color:var(--descrip-text);font-size:10px;cursor:pointer";
    tab.addEventListener("click", () => show(group));
    bar.append(tab);
  }
  show(groups[0]);
  box.append(bar, row);
  const widget = node.addDOMWidget("k5_sizes", "k5sizes", box, { serialize: false, getMinHeight: () => HEIGHT });
  widget.serialize = false;
}
