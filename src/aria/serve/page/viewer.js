// A picture or clip as large as the window allows.

import { iconButton, make } from "./dom.js";
import { loadMedium } from "./store.js";

export async function enlarge(item) {
  const dialog = make("dialog.large", { "aria-label": item.name });
  let address = null;
  try {
    address = URL.createObjectURL(await loadMedium(item.id));
    dialog.append(item.kind === "image" ? make("img", { src: address, alt: item.name })
      : make("video", { src: address, controls: true, autoplay: true }));
  } catch (error) {
    dialog.append(make("p", {}, error.message));
  }
  dialog.append(iconButton("close", "Close", () => dialog.close()));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    dialog.remove();
    if (address) URL.revokeObjectURL(address);
  });
  document.body.append(dialog);
  dialog.showModal();
}
