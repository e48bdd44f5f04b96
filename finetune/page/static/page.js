// What htmx has no attribute for: the slider over samples, and the radio button beside a typed model.
"use strict";

document.addEventListener("input", (event) => {
  const slider = event.target.closest(".samples input[type=range]");
  if (slider) {
    const box = slider.closest(".samples");
    const sample = box.querySelectorAll("data")[Number(slider.value)];
    box.querySelector("img").src = box.dataset.base + sample.value;
    box.querySelector("img").alt = `Samples: ${sample.textContent}`;
    box.querySelector("output").textContent = sample.textContent;
  }
  const other = event.target.closest("[data-other-name]");
  if (other) {
    const radio = document.querySelector("[data-other]");
    radio.value = other.value;
    radio.checked = true;
  }
});
