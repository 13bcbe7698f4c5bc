// Kandinsky 5: text that nodes show, and pictures of the sizes on latent nodes.
import { app } from "../../scripts/app.js";
import { SIZE_GROUPS } from "./sizes.js";
import { sizePicker } from "./size_picker.js";

const SHOWS_TEXT = new Set(["K5LoadModel", "K5LoadAll", "K5ModelInfo", "K5Sample", "K5LoadLora", "K5EnhancePrompt",
  "K5MergeLora", "K5ExtractLora", "K5ResizeLora", "K5ConvertLora", "K5LoraInfo", "K5Soup", "K5SoupFolder", "K5Plan"]);
const PICKS_SIZE = new Set(["K5EmptyLatent", "K5ImageToVideo"]);
const SHOWN = "k5_shown";

// A read-only text under the node with what it found or used; never sent with the prompt, never saved.
function showText(node, text) {
  let area = node.widgets?.find((widget) => widget.name === SHOWN);
  if (!area) {
    const element = document.createElement("textarea");
    element.readOnly = true;
    element.rows = 4;
    element.className = "comfy-multiline-input";
    element.style.fontSize = "11px";
    area = node.addDOMWidget(SHOWN, "k5text", element, { serialize: false, getMinHeight: () => 72 });
    area.serialize = false;
    node.setSize([Math.max(node.size[0], 320), node.size[1] + 80]);
  }
  area.element.value = text;
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "kandinsky5.studio",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (SHOWS_TEXT.has(nodeData.name)) {
      const executed = nodeType.prototype.onExecuted;
      nodeType.prototype.onExecuted = function (message) {
        executed?.apply(this, arguments);
        const text = message?.text;
        if (text) showText(this, Array.isArray(text) ? text.join("\n") : String(text));
      };
    }
    if (PICKS_SIZE.has(nodeData.name)) {
      const created = nodeType.prototype.onNodeCreated;
      nodeType.prototype.onNodeCreated = function () {
        created?.apply(this, arguments);
        sizePicker(this, SIZE_GROUPS);
      };
    }
  },
});
