// Numbers in words.

const WHOLE = new Intl.NumberFormat("en");
const MODES = { "non-think": "Non-think", low: "Low", high: "High", max: "Max" };
const UNITS = ["B", "KB", "MB", "GB", "TB"];

export const whole = (number) => WHOLE.format(number);
export const inTokens = (number) => `${whole(number)} ${number === 1 ? "token" : "tokens"}`;
export const inSpeed = (speed) => `${speed < 10 ? speed.toFixed(1) : whole(Math.round(speed))} tok/s`;
export const inModes = (mode) => MODES[mode] ?? mode;

/** At most three digits. */
export function inSeconds(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

/** Decimal units, as disks and links have them; two digits or more. */
export function inBytes(bytes) {
  let unit = 0;
  let number = bytes;
  while (number >= 999.5 && unit < UNITS.length - 1) {
    number /= 1000;
    unit += 1;
  }
  return `${unit === 0 || number >= 9.95 ? Math.round(number) : number.toFixed(1)} ${UNITS[unit]}`;
}

/** A part of a whole, in per cent. */
export function inPercent(part) {
  const percent = part * 100;
  if (percent > 0 && percent < 0.1) return "< 0.1%";
  return `${percent < 10 ? percent.toFixed(1).replace(".0", "") : Math.round(percent)}%`;
}
