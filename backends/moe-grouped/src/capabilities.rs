use polyattn_api::{DType, Decline, DeviceFacts, DeviceKind, MoeProblem};
use polyattn_nn::ops::MOST_EXPERTS;

/// What `grouped` cannot serve: formats that are no floats, more experts than its sorting counts, and on a GPU experts
/// that cannot be bound together.
pub(crate) fn declines(problem: &MoeProblem, device: &DeviceFacts) -> Vec<Decline> {
    let mut reasons = Vec::new();
    if !matches!(problem.dtype, DType::F32 | DType::F16 | DType::BF16) {
        reasons.push(Decline::Dtype(problem.dtype));
    }
    if problem.experts > MOST_EXPERTS {
        reasons.push(Decline::Other(format!("{} experts", problem.experts).into()));
    }
    let bytes = u64::from(problem.experts) * problem.gate_up_bytes();
    let most = device.limits.binding_bytes;
    if device.kind != DeviceKind::Cpu && bytes > most {
        let what = format!("{} experts of {bytes} bytes together in one binding of {most}", problem.experts);
        reasons.push(Decline::Other(what.into()));
    }
    reasons
}
