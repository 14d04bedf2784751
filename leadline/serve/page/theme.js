// Light or dark, set before anything is drawn; without a choice the system decides.
try {
  const chosen = localStorage.getItem("leadline.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is blocked: the system decides.
}
