// Small pictures of media, as data: URIs that are kept with a conversation.

import { icon, make } from "./dom.js";
import { plural } from "./words.js";

const SIDE = 320;
const PATIENCE = 8000; // ms until a clip that the browser cannot show gets a drawing instead

/** @returns {Promise<string | null>} null: the browser cannot show this one. */
export async function thumbOf(kind, blob) {
  const address = URL.createObjectURL(blob);
  try {
    if (kind === "image") return await ofPicture(address);
    if (kind === "video") return await ofClip(address);
    return null;
  } catch {
    return null; // What the browser cannot read the server may: it shows the name without a picture.
  } finally {
    URL.revokeObjectURL(address);
  }
}

async function ofPicture(address) {
  const picture = new Image();
  picture.src = address;
  await picture.decode();
  return drawn(picture, picture.naturalWidth, picture.naturalHeight);
}

function ofClip(address) {
  const clip = document.createElement("video");
  clip.muted = true;
  clip.preload = "auto";
  return new Promise((done, failed) => {
    const late = setTimeout(() => failed(new Error("too slow")), PATIENCE);
    clip.onerror = () => failed(new Error("not readable"));
    // The very first frame is often black.
    clip.onloadeddata = () => (clip.currentTime = Math.min(1, (clip.duration || 0) / 2));
    clip.onseeked = () => {
      clearTimeout(late);
      done(drawn(clip, clip.videoWidth, clip.videoHeight));
    };
    clip.src = address;
  }).finally(() => clip.removeAttribute("src"));
}

function drawn(source, width, height) {
  const scale = Math.min(1, SIDE / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/webp", 0.85);
}

/** A picture of a medium, with a play sign on clips and the number of pages on documents. */
export function pictureOf(item) {
  const picture = item.thumb ? make("img", { src: item.thumb, alt: item.name }) : icon(item.kind === "video" ? "clip" : "document");
  return make("span.picture", {}, picture,
    item.kind === "video" && item.thumb ? make("span.play", {}, icon("play")) : null,
    item.kind === "document" && item.pages ? make("span.badge", {}, plural(item.pages, "page")) : null);
}
