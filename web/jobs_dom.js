// Small things to build the panel with; what files say enters the page as text only.

// An element: properties as they are, `data-`, `aria-` and `role` as attributes, on<event> as listeners.
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const icon = (name) => el("i", { className: `pi pi-${name}`, "aria-hidden": "true" });

export function button(label, iconName, onclick, { kind = "", iconOnly = false, name = label } = {}) {
  const text = iconOnly ? null : el("span", { textContent: label });
  return el("button", { type: "button", className: `k5-button ${kind}`, title: name, "aria-label": name, onclick }, icon(iconName), text);
}

// Only where it differs: a text that is set again loses the user's selection.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// The elements of `wanted`, in that order, in `parent`; those already there stay, with their focus.
export function arrange(parent, wanted) {
  const kept = new Set(wanted);
  for (const child of [...parent.children]) if (!kept.has(child)) child.remove();
  wanted.forEach((child, index) => {
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
  });
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages over plain HTTP from another machine have no clipboard.
    const area = el("textarea", { value: text });
    area.style.cssText = "position:fixed;opacity:0";
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}
