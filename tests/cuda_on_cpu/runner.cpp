// Runs calls of the CUDA kernels on the emulator: `runner CALLS RESULTS forward|reverse|random`. harness.py writes the
// calls and says what a file of them looks like. Each buffer lies at the very end of its own allocation, or, without a
// sanitizer, between guards of NaN that are checked afterwards. Only rows spread over more memory than there is have
// neither.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "emulator.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

constexpr std::size_t kAlignment = 256;
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kGuard = 0;
#else
constexpr std::size_t kGuard = 512;
#endif

class Buffer {
  public:
    Buffer(std::size_t bytes, std::size_t misalignment) : bytes_(bytes), before_(kGuard + misalignment) {
        void* memory = nullptr;
        if (posix_memalign(&memory, kAlignment, before_ + bytes_ + kGuard) != 0) std::abort();
        memory_ = static_cast<unsigned char*>(memory);
        std::memset(memory_, 0xff, before_ + bytes_ + kGuard);
#if defined(__SANITIZE_ADDRESS__)
        ASAN_POISON_MEMORY_REGION(memory_, before_);
#endif
    }
    // Pieces that many bytes apart.
    Buffer(std::size_t bytes, std::size_t piece, std::size_t spread)
        : bytes_(bytes), piece_(piece), spread_(spread), mapped_(bytes / piece * spread) {
        void* const memory =
            mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error("the system does not reserve that much memory");
        memory_ = static_cast<unsigned char*>(memory);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
        if (mapped_ != 0) {
            munmap(memory_, mapped_);
            return;
        }
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(memory_, before_);
#endif
        std::free(memory_);
    }

    unsigned char* data() const { return memory_ + before_; }
    std::size_t bytes() const { return bytes_; }

    // Calls visit(address, bytes) for each piece in turn.
    template <class Visit>
    void each_piece(const Visit& visit) const {
        const std::size_t piece = mapped_ != 0 ? piece_ : bytes_;
        for (std::size_t at = 0, i = 0; at < bytes_; at += piece, ++i) visit(data() + i * spread_, piece);
    }
    bool is_intact() const {
        if (kGuard == 0 || mapped_ != 0) return true;
        for (std::size_t i = 0; i < before_ + bytes_ + kGuard; ++i) {
            if ((i < before_ || i >= before_ + bytes_) && memory_[i] != 0xff) return false;
        }
        return true;
    }

  private:
    unsigned char* memory_ = nullptr;
    std::size_t bytes_;
    std::size_t before_ = 0;
    std::size_t piece_ = 0;
    std::size_t spread_ = 0;
    std::size_t mapped_ = 0;
};

struct Call {
    std::string name;
    std::vector<std::int64_t> integers;
    std::vector<double> numbers;
    std::vector<std::unique_ptr<Buffer>> buffers;  // null is absent
    std::size_t next_integer = 0;
    std::size_t next_number = 0;
    std::size_t next_buffer = 0;

    std::int64_t integer() { return integers.at(next_integer++); }
    double number() { return numbers.at(next_number++); }
    template <class T = void>
    T* buffer() {
        const auto& found = buffers.at(next_buffer++);
        return found == nullptr ? nullptr : reinterpret_cast<T*>(found->data());
    }
};

template <class T>
T read(std::istream& from) {
    T value{};
    from.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
}

Call read_call(std::istream& from) {
    Call call;
    call.name.resize(static_cast<std::size_t>(read<std::int64_t>(from)));
    from.read(call.name.data(), static_cast<std::streamsize>(call.name.size()));
    call.integers.resize(static_cast<std::size_t>(read<std::int64_t>(from)));
    for (auto& value : call.integers) value = read<std::int64_t>(from);
    call.numbers.resize(static_cast<std::size_t>(read<std::int64_t>(from)));
    for (auto& value : call.numbers) value = read<double>(from);
    call.buffers.resize(static_cast<std::size_t>(read<std::int64_t>(from)));
    for (auto& buffer : call.buffers) {
        const auto bytes = read<std::int64_t>(from);
        const auto misalignment = read<std::int64_t>(from);
        const auto piece = read<std::int64_t>(from);
        const auto spread = read<std::int64_t>(from);
        if (bytes < 0) continue;
        const auto size = [](std::int64_t value) { return static_cast<std::size_t>(value); };
        buffer = spread > 0 ? std::make_unique<Buffer>(size(bytes), size(piece), size(spread))
                            : std::make_unique<Buffer>(size(bytes), size(misalignment));
        buffer->each_piece([&](unsigned char* data, std::size_t count) {
            from.read(reinterpret_cast<char*>(data), static_cast<std::streamsize>(count));
        });
    }
    return call;
}

edge::TokenRows take_rows(Call& call) {
    edge::TokenRows rows;
    rows.dtype = static_cast<edge::DType>(call.integer());
    rows.row_stride = call.integer();
    rows.rows = call.integer();
    rows.vocab = call.integer();
    rows.ignore_index = call.integer();
    rows.transform.inv_temperature = call.number();
    rows.transform.softcap = call.number();
    rows.transform.logit_scale = call.number();
    rows.logits = call.buffer();
    rows.targets = call.buffer<const std::int64_t>();
    return rows;
}

edge::LossRule take_rule(Call& call) {
    edge::LossRule rule;
    rule.objective = static_cast<edge::Objective>(call.integer());
    rule.ratio_of_sequence = call.integer() != 0;
    rule.bias_corrects_kl = call.integer() != 0;
    rule.sampler_of_sequence = call.integer() != 0;
    rule.sampler_masks = call.integer() != 0;
    rule.injected = static_cast<edge::Injected>(call.integer());
    rule.epsilon_low = call.number();
    rule.epsilon_high = call.number();
    rule.delta = call.number();
    rule.sapo_temperature_pos = call.number();
    rule.sapo_temperature_neg = call.number();
    rule.beta = call.number();
    rule.sampler_cap = call.number();
    rule.sampler_floor = call.number();
    rule.sft_weight = call.number();
    rule.shaped_gamma = call.number();
    rule.max_log_ratio = call.number();
    rule.max_kl_log_ratio = call.number();
    return rule;
}

edge::TokenTensors take_tensors(Call& call) {
    edge::TokenTensors tensors;
    tensors.mask = call.buffer<const std::uint8_t>();
    tensors.weight = call.buffer();
    tensors.advantages = call.buffer();
    tensors.old_logprobs = call.buffer();
    tensors.ref_logprobs = call.buffer();
    tensors.sampler_ratio = call.buffer();
    tensors.sampling_logprobs = call.buffer();
    tensors.injected = call.buffer<const std::uint8_t>();
    tensors.entropy_threshold = call.buffer();
    tensors.bonus_weight = call.buffer();
    return tensors;
}

void forward(Call& call, const edge::TokenRows& rows, const edge::cuda::Launch& launch) {
    edge::TokenStatsForward arguments;
    arguments.rows = rows;
    arguments.logprobs = call.buffer();
    arguments.entropy = call.buffer();
    arguments.logsumexp = call.buffer();
    arguments.maximum = call.buffer();
    arguments.total = call.buffer();
    edge::cuda::token_stats_forward(arguments, launch);
}

// A gradient that is absent is written over the logits.
template <class Arguments>
void take_gradient(Call& call, Arguments& arguments) {
    arguments.grad_row_stride = call.integer();
    arguments.grad_logits = call.buffer();
    if (arguments.grad_logits == nullptr) arguments.grad_logits = const_cast<void*>(arguments.rows.logits);
}

void backward(Call& call, const edge::TokenRows& rows, const edge::cuda::Launch& launch) {
    edge::TokenStatsBackward arguments;
    arguments.rows = rows;
    take_gradient(call, arguments);
    arguments.entropy = call.buffer();
    arguments.maximum = call.buffer();
    arguments.total = call.buffer();
    arguments.grad_logprobs = call.buffer();
    arguments.grad_entropy = call.buffer();
    arguments.grad_logsumexp = call.buffer();
    edge::cuda::token_stats_backward(arguments, launch);
}

void sweep(Call& call, const edge::TokenRows& rows, const edge::cuda::Launch& launch) {
    edge::GrpoSweep arguments;
    arguments.rows = rows;
    take_gradient(call, arguments);
    arguments.rule = take_rule(call);
    arguments.tensors = take_tensors(call);
    arguments.logprobs = call.buffer();
    arguments.entropy = call.buffer();
    edge::cuda::grpo_sweep(arguments, launch);
}

void token_loss(Call& call) {
    edge::TokenLoss arguments;
    arguments.sequences = call.integer();
    arguments.length = call.integer();
    arguments.rule = take_rule(call);
    arguments.logprobs = call.buffer();
    arguments.entropy = call.buffer();
    arguments.tensors = take_tensors(call);
    arguments.loss = call.buffer();
    arguments.metrics = call.buffer();
    arguments.d_logprobs = call.buffer();
    arguments.d_entropy = call.buffer();
    const Buffer workspace(edge::cuda::token_loss_workspace_bytes(arguments.sequences, arguments.length, {}), 0);
    edge::cuda::token_loss(arguments, {0, nullptr, workspace.data(), workspace.bytes()});
    if (!workspace.is_intact()) throw std::runtime_error("the kernel wrote outside its workspace");
}

void run(Call& call) {
    emulator::device.multiprocessors = static_cast<int>(call.integer());
    emulator::device.shared_bytes_per_block = static_cast<int>(call.integer());
    emulator::device.shared_bytes_per_multiprocessor = static_cast<int>(call.integer());
    emulator::device.l2_bytes = static_cast<int>(call.integer());
    if (call.name == "token_loss") {
        token_loss(call);
    } else {
        const edge::TokenRows rows = take_rows(call);
        const Buffer workspace(edge::cuda::row_workspace_bytes(rows, {}), 0);
        const edge::cuda::Launch launch{0, nullptr, workspace.data(), workspace.bytes()};
        if (call.name == "forward") {
            forward(call, rows, launch);
        } else if (call.name == "backward") {
            backward(call, rows, launch);
        } else if (call.name == "sweep") {
            sweep(call, rows, launch);
        } else {
            throw std::runtime_error("unknown call " + call.name);
        }
        if (!workspace.is_intact()) throw std::runtime_error("the kernel wrote outside its workspace");
    }
    for (std::size_t i = 0; i < call.buffers.size(); ++i) {
        if (call.buffers[i] != nullptr && !call.buffers[i]->is_intact()) {
            throw std::runtime_error("the kernel wrote outside buffer " + std::to_string(i));
        }
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 4) return 2;
    std::ifstream calls(arguments[1], std::ios::binary);
    std::ofstream results(arguments[2], std::ios::binary);
    const std::string order = arguments[3];
    emulator::order = order == "reverse"  ? emulator::Order::kReverse
                      : order == "random" ? emulator::Order::kRandom
                                          : emulator::Order::kForward;
    for (auto left = read<std::int64_t>(calls); left > 0; --left) {
        Call call = read_call(calls);
        ++emulator::seed;
        try {
            run(call);
        } catch (const std::exception& error) {
            std::fprintf(stderr, "%s: %s\n", call.name.c_str(), error.what());
            return 1;
        }
        for (const auto& buffer : call.buffers) {
            if (buffer == nullptr) continue;
            buffer->each_piece([&](const unsigned char* data, std::size_t bytes) {
                results.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(bytes));
            });
        }
    }
    return 0;
}
