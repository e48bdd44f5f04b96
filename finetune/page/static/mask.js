// A brush for loss masks over an image: what is painted counts, the rest is dark. The canvas is black where nothing
// counts, at 60 % opacity by the style sheet, so its alpha channel is the inverse of the mask.
const LONGEST = 1024; // pixels of a mask's longer side; training scales it to the image

export class MaskBrush {
  constructor(canvas, size, erasing) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.size = size;
    this.erasing = erasing;
    this.changed = false;
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.paint(event));
    canvas.addEventListener("pointerup", () => (this.last = null));
    canvas.addEventListener("pointercancel", () => (this.last = null));
  }

  // Show the mask of an image of this size; without one, nothing counts yet.
  async open([width, height], address) {
    const scale = Math.min(1, LONGEST / Math.max(width, height));
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.changed = false;
    if (!address) return this.clear();
    const image = new Image();
    image.src = address;
    await image.decode();
    this.context.drawImage(image, 0, 0, this.canvas.width, this.canvas.height);
    const pixels = this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
    for (let at = 0; at < pixels.data.length; at += 4) {
      pixels.data[at + 3] = 255 - pixels.data[at];
      pixels.data.fill(0, at, at + 3);
    }
    this.context.putImageData(pixels, 0, 0);
  }

  clear() {
    this.context.globalCompositeOperation = "source-over";
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }

  begin(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.last = this.place(event);
    this.paint(event);
  }

  paint(event) {
    if (!this.last) return;
    const now = this.place(event);
    const context = this.context;
    context.globalCompositeOperation = this.erasing.checked ? "source-over" : "destination-out";
    context.lineCap = "round";
    context.lineWidth = (Number(this.size.value) / 100) * Math.min(this.canvas.width, this.canvas.height);
    context.beginPath();
    context.moveTo(...this.last);
    context.lineTo(...now);
    context.stroke();
    this.last = now;
    this.changed = true;
  }

  // A PNG, white where it counts, as base64.
  png() {
    const whole = document.createElement("canvas");
    [whole.width, whole.height] = [this.canvas.width, this.canvas.height];
    const context = whole.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, whole.width, whole.height);
    context.drawImage(this.canvas, 0, 0);
    return whole.toDataURL("image/png").split(",")[1];
  }
}
