// Instruction sets: those that were linked, by number. A library built where it is used lacks what its machine cannot run.
#include "abi.h"

namespace qpass {

extern const Isa vnni_isa __attribute__((weak)), amx_isa __attribute__((weak));

const Isa* available_isa(int32_t isa) {
  const Isa* const linked[] = {&plain_isa, &avx2_isa, &vnni_isa, &amx_isa};
  return machine_runs(isa) ? linked[isa] : nullptr;
}

}  // namespace qpass

extern "C" int32_t qp_isa_available(int32_t isa) { return qpass::available_isa(isa) != nullptr; }
