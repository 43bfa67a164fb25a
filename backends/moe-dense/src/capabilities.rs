use polyattn_api::{DType, Decline, DeviceFacts, DeviceKind, MoeProblem};

/// What `dense` cannot serve: formats that are no floats, and experts so large that one alone cannot be bound.
pub(crate) fn declines(problem: &MoeProblem, device: &DeviceFacts) -> Vec<Decline> {
    let mut reasons = Vec::new();
    if !matches!(problem.dtype, DType::F32 | DType::F16 | DType::BF16) {
        reasons.push(Decline::Dtype(problem.dtype));
    }
    let bytes = problem.gate_up_bytes() + u64::from(device.limits.offset_alignment);
    let most = device.limits.binding_bytes;
    if device.kind != DeviceKind::Cpu && bytes > most {
        reasons.push(Decline::Other(format!("an expert of {bytes} bytes in bindings of {most}").into()));
    }
    reasons
}
