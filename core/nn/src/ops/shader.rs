//! The text of the kernels: templates in the `.wgsl` files beside this one, expanded for a variant.
//!
//! A template is WGSL with directives on lines of their own: `//for i N` … `//end` repeats what is between for `$i` from
//! 0 to N − 1, `//if F` and `//if !F` keep it where F is not, or is, zero, and `$N` stands for a number or a text.
//! Unrolled text keeps sums in registers on every driver, which loops over arrays do not.

use std::fmt::Write;

use polyattn_api::{HEAD_PARTS_WGSL, rotary_wgsl};
use polyattn_device::{
    Access::{self, Read, ReadWrite},
    DType, wgsl,
};

/// Weight rows that a group of lanes of the few-rows kernel reads.
pub(super) const WEIGHTS: u32 = 4;
/// Rows of its largest variant; more rows are more workgroups.
pub(super) const MOST_ROWS: u32 = 16;
/// Weight rows and rows of a tile of the many-rows kernel.
pub(super) const TILE: u32 = 64;
/// Elements that a workgroup of the copying kernels moves.
pub(super) const COPIED: u32 = 128;

/// A kernel's text and interface.
pub(super) struct Source {
    pub(super) text: String,
    pub(super) bindings: Vec<Access>,
    pub(super) immediate_bytes: u32,
}

/// Which matrix a product is with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stack {
    /// The only one.
    Single,
    /// One for each part of a row.
    Heads,
    /// One for each tile of rows.
    Experts,
}

/// What a matrix product is specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Product {
    pub(super) dtype: DType,
    /// Others than a single one have the few-rows kernel alone, and neither norm nor bias.
    pub(super) stack: Stack,
    /// Whether columns come in whole chunks of 8.
    pub(super) aligned: bool,
    /// Gates and ups, with the activation.
    pub(super) paired: bool,
    pub(super) norm: bool,
    pub(super) bias: bool,
}

/// What the few-rows kernel is specialised by besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Few {
    pub(super) product: Product,
    /// Rows of a workgroup, a power of two up to [`MOST_ROWS`].
    pub(super) rows: u32,
    /// Lanes that share a row's columns; the subgroup's width, if `subgroups`.
    pub(super) lanes: u32,
    /// Groups of lanes in a workgroup.
    pub(super) groups: u32,
    /// Chunks of each weight row that a lane has on its way at once.
    pub(super) unroll: u32,
    pub(super) subgroups: bool,
}

impl Few {
    /// Outputs of a group of lanes.
    pub(super) fn outputs(&self) -> u32 {
        if self.product.paired { WEIGHTS / 2 } else { WEIGHTS }
    }
}

/// What the RoPE kernel is specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rope {
    pub(super) head_dim: u32,
    pub(super) interleaved: bool,
    /// Format of the queries, if there are any.
    pub(super) queries: Option<DType>,
    /// Whether these lie in two parts.
    pub(super) parts: bool,
    pub(super) q_norm: bool,
    pub(super) k_norm: bool,
}

impl Product {
    fn vars(&self) -> Vec<(&'static str, String)> {
        let flag = |on: bool| u32::from(on).to_string();
        vec![
            ("ALIGNED", flag(self.aligned)),
            ("PAIRED", flag(self.paired)),
            ("NORM", flag(self.norm)),
            ("BIAS", flag(self.bias)),
            ("BIAS_AT", (3 + u32::from(self.norm)).to_string()),
            ("SINGLE", flag(self.stack == Stack::Single)),
            ("HEADS", flag(self.stack == Stack::Heads)),
            ("EXPERTS", flag(self.stack == Stack::Experts)),
            ("PARTS", (1 + u32::from(self.paired)).to_string()),
        ]
    }

    fn source(&self, kernel: &str, vars: &[(&str, String)]) -> Source {
        let mut text = wgsl::PREAMBLE.to_owned();
        text += &wgsl::storage_loader(1, "weights", self.dtype);
        expand(include_str!("chunks.wgsl"), vars, &mut text);
        expand(kernel, vars, &mut text);
        let mut bindings = vec![Read, Read, ReadWrite];
        bindings.extend([Read; 2].iter().take(usize::from(self.norm) + usize::from(self.bias)));
        bindings.extend([Read; 2].iter().filter(|_| self.stack == Stack::Experts));
        Source { text, bindings, immediate_bytes: if self.stack == Stack::Single { 32 } else { 44 } }
    }
}

/// The few-rows kernel.
pub(super) fn few_rows(few: &Few) -> Source {
    let outputs = few.outputs();
    // Sums to form, of which each lane ends with `stores`, or each `1 << shift` lanes with one.
    let sums = few.rows * outputs;
    let stores = (sums / few.lanes).max(1);
    let shift = (few.lanes / sums).max(1).ilog2();
    let mut reduction = Reduction::new(few);
    let mut main = String::new();
    let totals = (0..few.rows).flat_map(|row| (0..outputs).map(move |output| (row, output))).map(|(row, output)| {
        if few.product.paired {
            format!("vec2<f32>(sum_{row}_{}, sum_{row}_{})", 2 * output, 2 * output + 1)
        } else {
            format!("sum_{row}_{output}")
        }
    });
    let totals =
        reduction.halve("t", if few.product.paired { "vec2<f32>" } else { "f32" }, totals.collect(), &mut main);
    let squares = if few.product.norm {
        reduction.halve("q", "f32", (0..few.rows).map(|row| format!("square_{row}")).collect(), &mut main)
    } else {
        Vec::new()
    };
    for (place, total) in totals.iter().enumerate() {
        let _ = writeln!(main, "    let total_{place} = {total};");
        let scale = match squares.get(place / outputs as usize) {
            Some(square) => format!("inverseSqrt({square} / f32(p.cols) + p.eps)"),
            None => "1.0".to_owned(),
        };
        let _ = writeln!(main, "    let scale_{place} = {scale};");
    }
    let mut vars = few.product.vars();
    vars.extend([
        ("ROWS", few.rows.to_string()),
        ("OUTS", outputs.to_string()),
        ("WEIGHTS", WEIGHTS.to_string()),
        ("LANES", few.lanes.to_string()),
        ("GROUPS", few.groups.to_string()),
        ("WORKGROUP", (few.groups * few.lanes).to_string()),
        ("UNROLL", few.unroll.to_string()),
        ("SUBGROUPS", u32::from(few.subgroups).to_string()),
        ("STORES", stores.to_string()),
        ("SHIFT", shift.to_string()),
        ("IDLE", ((1 << shift) - 1).to_string()),
    ]);
    let template = include_str!("few_rows.wgsl").replace("//reduce\n", &main);
    let mut source = few.product.source(&template, &vars);
    source.text.insert_str(0, &reduction.memory);
    source
}

/// Writes the code that adds up values over the lanes of a group.
struct Reduction {
    lanes: u32,
    workgroup: u32,
    subgroups: bool,
    memory: String,
}

/// Values that an invocation exchanges through workgroup memory between two barriers.
const SLOTS: usize = 8;

impl Reduction {
    fn new(few: &Few) -> Self {
        Self { lanes: few.lanes, workgroup: few.lanes * few.groups, subgroups: few.subgroups, memory: String::new() }
    }

    /// At each step two lanes share the values they still hold: each adds the other's part of its half to its own, and
    /// forgets the other half. A value's sum thus has the form of a binary tree over the lanes, the same for every
    /// number of values; when one value is left, lanes repeat each other. Returns the names of the values left.
    fn halve(&mut self, prefix: &str, kind: &str, mut values: Vec<String>, main: &mut String) -> Vec<String> {
        if !self.subgroups {
            for side in 0..2 {
                let length = self.workgroup as usize * values.len().div_ceil(2).min(SLOTS);
                let _ = writeln!(self.memory, "var<workgroup> {prefix}_memory_{side}: array<{kind}, {length}>;");
            }
        }
        let mut side = 0;
        let mut distance = self.lanes / 2;
        while distance > 0 {
            let _ = writeln!(main, "    let {prefix}_upper_{distance} = (lane & {distance}u) != 0u;");
            let half = values.len() / 2;
            let names: Vec<_> = (0..half.max(1)).map(|place| format!("{prefix}_{distance}_{place}")).collect();
            for batch in (0..names.len()).collect::<Vec<_>>().chunks(SLOTS) {
                let sent = |place: usize| match half {
                    0 => values[0].clone(),
                    _ => format!("select({}, {}, {prefix}_upper_{distance})", values[half + place], values[place]),
                };
                let kept = |place: usize| match half {
                    0 => values[0].clone(),
                    _ => format!("select({}, {}, {prefix}_upper_{distance})", values[place], values[half + place]),
                };
                if !self.subgroups {
                    for (slot, place) in batch.iter().enumerate() {
                        let at = slot as u32 * self.workgroup;
                        let _ = writeln!(main, "    {prefix}_memory_{side}[{at}u + local] = {};", sent(*place));
                    }
                    // One barrier is enough: the other side's memory is written next.
                    main.push_str("    workgroupBarrier();\n");
                }
                for (slot, place) in batch.iter().enumerate() {
                    let got = if self.subgroups {
                        format!("subgroupShuffleXor({}, {distance}u)", sent(*place))
                    } else {
                        let at = slot as u32 * self.workgroup;
                        format!("{prefix}_memory_{side}[{at}u + (local ^ {distance}u)]")
                    };
                    let _ = writeln!(main, "    let {} = {} + {got};", names[*place], kept(*place));
                }
                side = 1 - side;
            }
            values = names;
            distance /= 2;
        }
        values
    }
}

/// The many-rows kernel.
pub(super) fn many_rows(product: &Product) -> Source {
    let mut vars = product.vars();
    vars.push(("OUTS", (if product.paired { TILE / 2 } else { TILE }).to_string()));
    product.source(include_str!("many_rows.wgsl"), &vars)
}

/// The embedding kernel.
pub(super) fn embed(dtype: DType) -> Source {
    let mut text = wgsl::PREAMBLE.to_owned();
    text += &wgsl::storage_loader(1, "weights", dtype);
    text += include_str!("embed.wgsl");
    Source { text, bindings: vec![Read, Read, ReadWrite], immediate_bytes: 20 }
}

/// The norm kernel.
pub(super) fn rms_norm() -> Source {
    let text = include_str!("rms_norm.wgsl").to_owned();
    Source { text, bindings: vec![Read, Read, ReadWrite], immediate_bytes: 12 }
}

/// The RoPE kernel.
pub(super) fn rope(rope: &Rope) -> Source {
    let flag = |on: bool| u32::from(on).to_string();
    let dtype = rope.queries.unwrap_or(DType::F32);
    let mut text = wgsl::PREAMBLE.to_owned();
    text += &rotary_wgsl(rope.head_dim, rope.head_dim, rope.interleaved, rope.q_norm, rope.k_norm);
    if rope.parts {
        text += HEAD_PARTS_WGSL;
    }
    let before_norms = 3 + u32::from(rope.queries.is_some()) + 2 * u32::from(rope.parts);
    expand(
        include_str!("rope.wgsl"),
        &[
            ("QUERIES", flag(rope.queries.is_some())),
            ("WIDE", flag(dtype == DType::F32)),
            ("NARROW", wgsl::narrow2(dtype, "both")),
            ("Q_NORM", flag(rope.q_norm)),
            ("K_NORM", flag(rope.k_norm)),
            ("PARTS", flag(rope.parts)),
            ("Q_NORM_AT", before_norms.to_string()),
            ("K_NORM_AT", (before_norms + u32::from(rope.q_norm)).to_string()),
        ],
        &mut text,
    );
    let mut bindings = vec![ReadWrite, Read, Read];
    bindings.extend(rope.queries.map(|_| ReadWrite));
    let optional = 2 * usize::from(rope.parts) + usize::from(rope.q_norm) + usize::from(rope.k_norm);
    bindings.extend([Read; 4].iter().take(optional));
    Source { text, bindings, immediate_bytes: 72 }
}

/// The argmax kernel; `workgroup` is a power of two.
pub(super) fn argmax(aligned: bool, workgroup: u32) -> Source {
    let mut text = String::new();
    let vars = [("ALIGNED", u32::from(aligned).to_string()), ("WORKGROUP", workgroup.to_string())];
    expand(include_str!("largest.wgsl"), &vars, &mut text);
    expand(include_str!("argmax.wgsl"), &vars, &mut text);
    Source { text, bindings: vec![Read, ReadWrite], immediate_bytes: 12 }
}

/// The kernel of the largest elements; `workgroup` is a power of two.
pub(super) fn top_k(workgroup: u32) -> Source {
    let mut text = String::new();
    let vars = [("WORKGROUP", workgroup.to_string())];
    expand(include_str!("largest.wgsl"), &vars, &mut text);
    expand(include_str!("top_k.wgsl"), &vars, &mut text);
    Source { text, bindings: vec![Read, ReadWrite, ReadWrite], immediate_bytes: 12 }
}

/// The kernel that fetches ids.
pub(super) fn gather_ids() -> Source {
    let text = include_str!("gather_ids.wgsl").to_owned();
    Source { text, bindings: vec![Read, Read, ReadWrite], immediate_bytes: 8 }
}

/// The kernel that fetches rows.
pub(super) fn gather_rows() -> Source {
    let text = include_str!("gather_rows.wgsl").to_owned();
    Source { text, bindings: vec![Read, Read, ReadWrite], immediate_bytes: 12 }
}

/// The kernel of a residual SiLU.
pub(super) fn add_silu() -> Source {
    let text = include_str!("add_silu.wgsl").to_owned();
    Source { text, bindings: vec![Read, Read, ReadWrite], immediate_bytes: 4 }
}

/// The kernel that copies columns.
pub(super) fn copy_columns() -> Source {
    let text = include_str!("copy_columns.wgsl").to_owned();
    Source { text, bindings: vec![Read, ReadWrite], immediate_bytes: 16 }
}

/// The kernel that chooses experts; `groups` is 0 where it chooses among all.
pub(super) fn route(experts: u32, groups: u32) -> Source {
    let mut text = String::new();
    let vars = [("EXPERTS", experts.to_string()), ("GROUPS", groups.to_string())];
    expand(include_str!("route.wgsl"), &vars, &mut text);
    Source { text, bindings: vec![Read, ReadWrite, ReadWrite], immediate_bytes: 28 }
}

/// The kernel that sorts pairs by expert.
pub(super) fn sort_by_expert(experts: u32) -> Source {
    let mut text = String::new();
    expand(include_str!("sort_by_expert.wgsl"), &[("EXPERTS", experts.to_string())], &mut text);
    Source { text, bindings: vec![Read, ReadWrite, ReadWrite], immediate_bytes: 16 }
}

/// The kernel that adds up what experts answered; `one` expert alone, or those of each row.
pub(super) fn combine(one: bool) -> Source {
    let mut text = String::new();
    expand(include_str!("combine.wgsl"), &[("ONE", u32::from(one).to_string())], &mut text);
    let mut bindings = vec![Read, Read, ReadWrite];
    bindings.extend(one.then_some(Read));
    Source { text, bindings, immediate_bytes: 16 }
}

/// Appends `template` to `out`, expanded; see the [module](self).
fn expand(template: &str, vars: &[(&str, String)], out: &mut String) {
    let lines: Vec<&str> = template.lines().collect();
    // Longer names first: `$BIAS_AT` is not `$BIAS` and a rest.
    let mut vars: Vec<(&str, &str)> = vars.iter().map(|(name, value)| (*name, value.as_str())).collect();
    vars.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
    block(&lines, &vars, &mut Vec::new(), out);
}

fn block<'a>(lines: &[&'a str], vars: &[(&str, &str)], loops: &mut Vec<(&'a str, u32)>, out: &mut String) {
    let number = |name: &str| -> u32 {
        name.parse().ok().or_else(|| vars.iter().find(|var| var.0 == name)?.1.parse().ok()).unwrap_or(0)
    };
    let mut at = 0;
    while let Some(line) = lines.get(at) {
        at += 1;
        let directive: Vec<&str> = line.split(' ').collect();
        let is_block = |line: &str| line.starts_with("//for ") || line.starts_with("//if ");
        if !is_block(line) {
            let mut text = (*line).to_owned();
            for (name, value) in vars {
                text = text.replace(&format!("${name}"), value);
            }
            for (name, value) in loops.iter() {
                text = text.replace(&format!("${name}"), &value.to_string());
            }
            out.push_str(&text);
            out.push('\n');
            continue;
        }
        let mut depth = 1;
        let length = lines[at..].iter().position(|line| {
            depth += i32::from(is_block(line)) - i32::from(*line == "//end");
            depth == 0
        });
        let end = at + length.unwrap_or(lines.len() - at);
        let inner = &lines[at..end];
        at = end + 1;
        match directive.as_slice() {
            ["//for", name, count] => {
                for value in 0..number(count) {
                    loops.push((*name, value));
                    block(inner, vars, loops, out);
                    loops.pop();
                }
            }
            [_, name] => {
                let (wanted, name) = name.strip_prefix('!').map_or((true, *name), |name| (false, name));
                if (number(name) != 0) == wanted {
                    block(inner, vars, loops, out);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use polyattn_device::{Access, DType};

    use super::{Few, Product, Rope, Source, Stack};

    /// Every variant passes naga as it does on a device, and becomes each of the languages that devices take.
    fn translates(name: &str, source: &Source) {
        let context = |stage: &str, error: &dyn std::fmt::Display| format!("{name}, {stage}: {error}\n{}", source.text);
        let module = naga::front::wgsl::parse_str(&source.text)
            .unwrap_or_else(|error| panic!("{}", context("parsing", &error.emit_to_string(&source.text))));
        let capabilities = naga::valid::Capabilities::IMMEDIATES
            | naga::valid::Capabilities::SUBGROUP
            | naga::valid::Capabilities::SUBGROUP_BARRIER
            | naga::valid::Capabilities::SHADER_FLOAT16_IN_FLOAT32;
        let validate = |module: &naga::Module| {
            naga::valid::Validator::new(naga::valid::ValidationFlags::all(), capabilities)
                .validate(module)
                .unwrap_or_else(|error| panic!("{}", context("validation", &error.emit_to_string(&source.text))))
        };
        let info = validate(&module);
        for (binding, access) in source.bindings.iter().enumerate() {
            let declared = format!(
                "@group(0) @binding({binding}) var<storage, {}>",
                match access {
                    Access::Read => "read",
                    Access::ReadWrite => "read_write",
                }
            );
            assert!(source.text.contains(&declared), "{name}: {declared}");
        }
        assert_eq!(source.text.matches("@binding(").count(), source.bindings.len(), "{name}");
        let (module, info) = naga::back::pipeline_constants::process_overrides(
            &module,
            &info,
            None,
            &naga::back::PipelineConstants::default(),
        )
        .unwrap_or_else(|error| panic!("{}", context("overrides", &error)));
        let pipeline =
            naga::back::spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: "main".into() };
        let options = naga::back::spv::Options { lang_version: (1, 3), ..naga::back::spv::Options::default() };
        naga::back::spv::write_vec(&module, &info, &options, Some(&pipeline))
            .unwrap_or_else(|error| panic!("{}", context("SPIR-V", &error)));
        let options = naga::back::msl::Options {
            lang_version: (2, 4),
            fake_missing_bindings: true,
            ..naga::back::msl::Options::default()
        };
        naga::back::msl::write_string(&module, &info, &options, &naga::back::msl::PipelineOptions::default())
            .unwrap_or_else(|error| panic!("{}", context("MSL", &error)));
        let options = naga::back::hlsl::Options {
            shader_model: naga::back::hlsl::ShaderModel::V6_0,
            fake_missing_bindings: true,
            immediates_target: Some(naga::back::hlsl::BindTarget::default()),
            special_constants_binding: Some(naga::back::hlsl::BindTarget { space: 1, ..Default::default() }),
            ..naga::back::hlsl::Options::default()
        };
        let mut text = String::new();
        let pipeline = naga::back::hlsl::PipelineOptions::default();
        naga::back::hlsl::Writer::new(&mut text, &options, &pipeline)
            .write(&module, &info, None)
            .unwrap_or_else(|error| panic!("{}", context("HLSL", &error)));
    }

    fn products() -> Vec<Product> {
        let mut products = Vec::new();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for flags in 0..16 {
                let flag = |bit: u32| flags >> bit & 1 == 1;
                let (norm, bias) = (flag(2), flag(3));
                let product = Product { dtype, stack: Stack::Single, aligned: flag(0), paired: flag(1), norm, bias };
                if !(product.paired && product.bias) {
                    products.push(product);
                }
                if !norm && !bias {
                    products.push(Product { stack: Stack::Heads, ..product });
                    products.push(Product { stack: Stack::Experts, ..product });
                }
            }
        }
        products
    }

    #[test]
    fn every_product_translates() {
        for product in products() {
            if product.stack == Stack::Single {
                translates(&format!("{product:?}"), &super::many_rows(&product));
            }
            for rows in [1, 2, 4, 8, 16] {
                for (lanes, subgroups) in [(4, true), (8, true), (32, true), (128, true), (32, false)] {
                    // The widths differ in nothing but numbers, so that each is translated for some products only.
                    if lanes != 32 && product.dtype != DType::F16 {
                        continue;
                    }
                    let few = Few { product, rows, lanes, groups: 2, unroll: 3, subgroups };
                    translates(&format!("{few:?}"), &super::few_rows(&few));
                }
            }
        }
    }

    #[test]
    fn every_other_kernel_translates() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            translates("embed", &super::embed(dtype));
        }
        translates("top_k", &super::top_k(256));
        translates("gather_ids", &super::gather_ids());
        for flag in [false, true] {
            translates("combine", &super::combine(flag));
        }
        for experts in [1, 160, 1024] {
            translates("route", &super::route(experts, 0));
            translates("sort by expert", &super::sort_by_expert(experts));
        }
        translates("rms_norm", &super::rms_norm());
        translates("route by group", &super::route(160, 8));
        translates("gather_rows", &super::gather_rows());
        translates("copy_columns", &super::copy_columns());
        translates("add_silu", &super::add_silu());
        for aligned in [true, false] {
            translates("argmax", &super::argmax(aligned, 256));
        }
        for flags in 0..16 {
            for queries in [None, Some(DType::F32), Some(DType::F16), Some(DType::BF16)] {
                let flag = |bit: u32| flags >> bit & 1 == 1;
                let [q_norm, parts] = [flag(1), flag(3)].map(|flag| flag && queries.is_some());
                let rope = Rope { head_dim: 64, interleaved: flag(0), queries, parts, q_norm, k_norm: flag(2) };
                translates(&format!("{rope:?}"), &super::rope(&rope));
            }
        }
    }

    #[test]
    fn templates_expand() {
        let mut text = String::new();
        let template = "//for i N\na$i\n//if F\nb$i $BIG_AT $BIG\n//end\n//if !F\nc\n//end\n//end\nz";
        let vars =
            |flag: u32| [("N", "2".to_owned()), ("F", flag.to_string()), ("BIG", "7".into()), ("BIG_AT", "8".into())];
        super::expand(template, &vars(1), &mut text);
        assert_eq!(text, "a0\nb0 8 7\na1\nb1 8 7\nz\n");
        text.clear();
        super::expand(template, &vars(0), &mut text);
        assert_eq!(text, "a0\nc\na1\nc\nz\n");
    }
}
