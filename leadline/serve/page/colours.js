// The switch between light and dark. `theme.js` has applied the choice before the first pixel was drawn.

const CHOICES = { "": "follows the system", light: "light", dark: "dark" };

/** Make a button of `button`: each click chooses the next of the three. */
export function switchColours(button) {
  const root = document.documentElement;
  const show = () => {
    const chosen = root.dataset.theme ?? "";
    const names = Object.keys(CHOICES);
    const next = names[(names.indexOf(chosen) + 1) % names.length];
    button.title = `Colours: ${CHOICES[chosen]}`;
    button.setAttribute("aria-label", `Colours: ${CHOICES[chosen]}; next: ${CHOICES[next]}`);
    return next;
  };
  button.addEventListener("click", () => {
    const next = show();
    if (next) root.dataset.theme = next;
    else delete root.dataset.theme;
    localStorage.setItem("leadline.theme", next);
    show();
  });
  show();
}
