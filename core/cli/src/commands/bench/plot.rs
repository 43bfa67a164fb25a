//! A roofline as SVG (Williams, Waterman and Patterson, CACM 2009): operations for each byte against operations by the
//! second, both logarithmic, under the lines that memory and arithmetic allow.

use std::fmt::Write;

use super::kernels::{Answer, significant};

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 600.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 170.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 50.0;
pub(super) const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"];

/// A logarithmic axis over whole decades.
struct Axis {
    first: i32,
    last: i32,
    from: f64,
    to: f64,
}

impl Axis {
    /// From pixel `from` to pixel `to`.
    fn over(values: impl Iterator<Item = f64> + Clone, from: f64, to: f64) -> Self {
        let usable = values.filter(|value| value.is_finite() && *value > 0.0).map(f64::log10);
        let (least, most) = usable.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)));
        let (first, last) = if least <= most { (least.floor() as i32, most.ceil() as i32) } else { (0, 1) };
        Self { first, last: last.max(first + 1), from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let part = (value.log10() - f64::from(self.first)) / f64::from(self.last - self.first);
        self.from + part * (self.to - self.from)
    }

    fn decades(&self) -> impl Iterator<Item = f64> {
        (self.first..=self.last).map(|power| 10f64.powi(power))
    }
}

/// The whole document.
pub(super) fn roofline(answer: &Answer) -> String {
    let points: Vec<(&str, &str, f64, f64)> = answer
        .shapes
        .iter()
        .flat_map(|shape| {
            let intensity = shape.about.flops as f64 / shape.about.bytes as f64;
            let own = shape.backends.iter();
            own.filter_map(move |row| {
                Some((row.backend, shape.about.shape.as_str(), intensity, row.numbers()?.teraflops))
            })
        })
        .collect();
    let bandwidth = answer.ceilings.copy_gigabytes_per_second / 1e3;
    let peaks: Vec<(&str, f64)> = answer.ceilings.products().collect();
    let highest = answer.ceilings.product_teraflops();

    let ridge = highest / bandwidth;
    let x = Axis::over(points.iter().map(|point| point.2).chain([1.0, ridge]), LEFT, WIDTH - RIGHT);
    let reached = points.iter().map(|point| point.3);
    let y = Axis::over(reached.chain(peaks.iter().map(|(_, peak)| *peak)), HEIGHT - BOTTOM, TOP);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n<text x=\"{LEFT}\" y=\"24\" \
         font-size=\"16\">{}</text>\n",
        escaped(&answer.device)
    );
    // Writing to a string cannot fail.
    let mut line = |x1: f64, y1: f64, x2: f64, y2: f64, style: &str| {
        let _ = writeln!(svg, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" {style}/>");
    };
    const GRID: &str = "stroke=\"#dddddd\"";
    const ROOF: &str = "stroke=\"#444444\" stroke-width=\"1.5\"";
    x.decades().for_each(|value| line(x.at(value), y.from, x.at(value), y.to, GRID));
    y.decades().for_each(|value| line(x.from, y.at(value), x.to, y.at(value), GRID));
    // The slope begins where it enters the picture, at the left or at the bottom.
    let lowest = 10f64.powi(x.first).max(10f64.powi(y.first) / bandwidth);
    line(x.at(lowest), y.at(lowest * bandwidth), x.at(ridge), y.at(highest), ROOF);
    for (_, peak) in &peaks {
        line(x.at((peak / bandwidth).max(lowest)), y.at(*peak), x.to, y.at(*peak), ROOF);
    }

    let mut text = |x: f64, y: f64, anchor: &str, words: &str| {
        let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escaped(words));
    };
    x.decades().for_each(|value| text(x.at(value), y.from + 16.0, "middle", &value.to_string()));
    y.decades().for_each(|value| text(x.from - 6.0, y.at(value) + 4.0, "end", &value.to_string()));
    text((x.from + x.to) / 2.0, HEIGHT - 12.0, "middle", "FLOP / byte");
    text(x.from, y.to - 8.0, "start", "TFLOP/s");
    for (name, peak) in &peaks {
        text(x.to + 6.0, y.at(*peak) + 4.0, "start", &format!("{name} {}", significant(*peak)));
    }
    let place = (lowest * ridge).sqrt();
    let copied = significant(bandwidth * 1e3);
    text(x.at(place) + 8.0, y.at(place * bandwidth) + 16.0, "start", &format!("copy {copied} GB/s"));

    let mut names: Vec<&str> = Vec::new();
    for (name, ..) in &points {
        if !names.contains(name) {
            names.push(name);
        }
    }
    for (name, colour) in names.iter().zip(COLOURS.iter().cycle()) {
        for (_, shape, intensity, reached) in points.iter().filter(|point| point.0 == *name && point.3 > 0.0) {
            let _ = writeln!(
                svg,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"{colour}\" fill-opacity=\"0.7\"><title>{}: {} {} \
                 TFLOP/s</title></circle>",
                x.at(*intensity),
                y.at(*reached),
                escaped(shape),
                escaped(name),
                significant(*reached)
            );
        }
    }
    for (at, (name, colour)) in names.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let height = HEIGHT - BOTTOM - 16.0 * (names.len() - at) as f64;
        let _ = writeln!(
            svg,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{height:.1}\">{}</text>",
            x.to + 12.0,
            height - 4.0,
            x.to + 22.0,
            escaped(name)
        );
    }
    svg + "</svg>\n"
}

pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
