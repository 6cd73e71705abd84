// The line at the foot of the text says what the word that is pointed at, tapped or walked to does. Without it titles remain.
(() => {
  const text = document.getElementById("words");
  const line = document.getElementById("word");
  if (!text || !line) return;
  const words = text.children;
  let pinned = null;
  const show = (word) => {
    const place = Array.prototype.indexOf.call(words, word);
    const routes = word.title || "the same routes in every layer";
    const margin = word.dataset.m ? `smallest margin ${word.dataset.m}` : "no choice to make";
    const shown = document.createElement("b");
    shown.textContent = word.textContent.replace(/\n/g, "⏎").replace(/ /g, "·");
    line.replaceChildren(shown, ` token ${place}: ${routes}; ${margin}`);
    line.className = word.classList.contains("wrong") ? "wrong" : word.classList.contains("excused") ? "excused" : "";
  };
  const pin = (word) => {
    if (pinned) pinned.removeAttribute("aria-current");
    pinned = word;
    word.setAttribute("aria-current", "true");
    show(word);
  };
  const wordOf = (event) => (event.target.parentNode === text ? event.target : null);
  text.addEventListener("click", (event) => wordOf(event) && pin(wordOf(event)));
  text.addEventListener("focusin", (event) => wordOf(event) && pin(wordOf(event)));
  text.addEventListener("pointerover", (event) => wordOf(event) && show(wordOf(event)));
  text.addEventListener("pointerleave", () => pinned && show(pinned));
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = pinned ? (step > 0 ? pinned.nextElementSibling : pinned.previousElementSibling) : words[0];
    if (!next) return;
    event.preventDefault();
    pin(next);
    next.scrollIntoView({ block: "nearest" });
  });
})();
