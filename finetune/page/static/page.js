// What htmx has no attribute for: the slider over samples, and the radio button beside a typed model.
"use strict";

// Show the options whose name or meaning has every word; sections without one are hidden.
function findOptions(text) {
  const words = text.toLowerCase().replaceAll("_", " ").split(/\s+/).filter(Boolean);
  document.querySelectorAll(".options .section").forEach((section) => {
    let any = false;
    section.querySelectorAll(".option").forEach((option) => {
      const said = option.textContent.toLowerCase().replaceAll("_", " ");
      option.hidden = !words.every((word) => said.includes(word));
      any ||= !option.hidden;
    });
    section.hidden = !any;
    section.open = words.length > 0 && any;
  });
}

// Hide the cards of runs whose name does not contain the text, also those that come later.
function findRuns() {
  const text = document.querySelector("[data-find-run]")?.value.trim().toLowerCase() ?? "";
  document.querySelectorAll(".card[data-name]").forEach((card) => {
    card.hidden = !card.dataset.name.toLowerCase().includes(text);
  });
}
document.addEventListener("htmx:sseMessage", findRuns);

// A chosen file as base64 in the hidden field that the input names.
document.addEventListener("change", (event) => {
  const input = event.target.closest("input[data-encode]");
  if (!input) return;
  const field = input.form.elements[input.dataset.encode];
  field.value = "";
  if (!input.files.length) return;
  const reader = new FileReader();
  reader.onload = () => (field.value = reader.result.split(",")[1]);
  reader.readAsDataURL(input.files[0]);
});

document.addEventListener("input", (event) => {
  const slider = event.target.closest(".samples input[type=range]");
  if (slider) {
    const box = slider.closest(".samples");
    const sample = box.querySelectorAll("data")[Number(slider.value)];
    box.querySelector("img").src = box.dataset.base + sample.value;
    box.querySelector("img").alt = `Samples: ${sample.textContent}`;
    box.querySelector("output").textContent = sample.textContent;
  }
  if (event.target.closest("[data-find-run]")) findRuns();
  const search = event.target.closest("[data-find-option]");
  if (search) findOptions(search.value);
  const other = event.target.closest("[data-other-name]");
  if (other) {
    const radio = document.querySelector("[data-other]");
    radio.value = other.value;
    radio.checked = true;
  }
});
