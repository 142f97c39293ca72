// The view of a conversation stays at its end while that grows, until the reader scrolls up.

const NEAR = 24; // pixels from the end that count as the end
const FAR = 200; // pixels from the end from which on a button leads back

export class Follow {
  /**
   * @param {HTMLElement} scroll what scrolls.
   * @param {HTMLElement} content what is in it.
   * @param {HTMLElement} button leads to the end.
   */
  constructor(scroll, content, button) {
    Object.assign(this, { scroll, content, button, following: true, top: 0 });
    scroll.addEventListener("scroll", () => this.look());
    button.addEventListener("click", () => this.toEnd());
    // Pictures, formulas and the message field change heights later than any text.
    const sizes = new ResizeObserver(() => this.stick());
    sizes.observe(scroll);
    sizes.observe(content);
  }

  get rest() {
    return this.scroll.scrollHeight - this.scroll.scrollTop - this.scroll.clientHeight;
  }

  /** Learns whether the reader has scrolled. The view alone moves up only where the content became shorter. */
  look() {
    const { scrollTop } = this.scroll;
    if (scrollTop < this.top - 1 && this.rest > 2) this.following = false;
    else if (this.rest < NEAR) this.following = true;
    this.top = scrollTop;
    this.button.hidden = this.following || this.rest < FAR;
  }

  /** To the end, unless the reader is elsewhere. */
  stick() {
    this.look();
    // An empty conversation has a page of its own, which is read from its beginning.
    if (!this.following || !this.content.offsetHeight) return;
    this.scroll.scrollTop = this.scroll.scrollHeight;
    this.top = this.scroll.scrollTop;
    this.button.hidden = true;
  }

  toEnd() {
    this.top = this.scroll.scrollTop;
    this.following = true;
    this.stick();
  }
}
