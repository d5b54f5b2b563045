// Finding and replacing the functions that a loaded library imports.

#pragma once

#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace jaxnets {

// The places in a loaded library that hold the address of an imported function.
class Imports {
 public:
  explicit Imports(const dl_phdr_info& info) : base_(info.dlpi_addr) {
    for (int i = 0; i < info.dlpi_phnum; ++i) {
      const auto& header = info.dlpi_phdr[i];
      if (header.p_type == PT_DYNAMIC) Read(reinterpret_cast<const ElfW(Dyn)*>(base_ + header.p_vaddr));
      if (header.p_type == PT_GNU_RELRO) read_only_ = {base_ + header.p_vaddr, header.p_memsz};
    }
  }

  std::vector<void**> Of(const char* function) const {
    std::vector<void**> places;
    for (const auto& [table, count] : tables_) {
      for (size_t i = 0; i < count; ++i) {
        const auto symbol = ELF64_R_SYM(table[i].r_info);
        if (!symbol || table[i].r_addend || strcmp(names_ + symbols_[symbol].st_name, function)) continue;
        places.push_back(reinterpret_cast<void**>(base_ + table[i].r_offset));
      }
    }
    return places;
  }

  bool Replace(void** place, void* function) const {
    const auto page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto address = reinterpret_cast<uintptr_t>(place);
    void* page = reinterpret_cast<void*>(address / page_size * page_size);
    // The loader protects whole pages only: the last one stays writable if it is shared with other data.
    const auto end = read_only_.start + read_only_.size;
    const bool read_only = address >= read_only_.start && (address / page_size + 1) * page_size <= end;
    if (read_only && mprotect(page, page_size, PROT_READ | PROT_WRITE)) return false;
    __atomic_store_n(place, function, __ATOMIC_RELEASE);
    if (read_only) mprotect(page, page_size, PROT_READ);
    return true;
  }

 private:
  struct Range {
    uintptr_t start = 0;
    size_t size = 0;
  };
  struct Table {
    const ElfW(Rela) * first;
    size_t count;
  };

  void Read(const ElfW(Dyn) * entry) {
    const ElfW(Rela)*plt = nullptr, *data = nullptr;
    size_t plt_bytes = 0, data_bytes = 0;
    for (; entry->d_tag != DT_NULL; ++entry) {
      // glibc has already added the base, except where the section is read-only.
      const uintptr_t address = entry->d_un.d_ptr < base_ ? base_ + entry->d_un.d_ptr : entry->d_un.d_ptr;
      if (entry->d_tag == DT_SYMTAB) symbols_ = reinterpret_cast<const ElfW(Sym)*>(address);
      if (entry->d_tag == DT_STRTAB) names_ = reinterpret_cast<const char*>(address);
      if (entry->d_tag == DT_JMPREL) plt = reinterpret_cast<const ElfW(Rela)*>(address);
      if (entry->d_tag == DT_RELA) data = reinterpret_cast<const ElfW(Rela)*>(address);
      if (entry->d_tag == DT_PLTRELSZ) plt_bytes = entry->d_un.d_val;
      if (entry->d_tag == DT_RELASZ) data_bytes = entry->d_un.d_val;
    }
    if (!symbols_ || !names_) return;
    if (plt) tables_.push_back({plt, plt_bytes / sizeof(ElfW(Rela))});
    if (data) tables_.push_back({data, data_bytes / sizeof(ElfW(Rela))});
  }

  uintptr_t base_;
  Range read_only_;
  const ElfW(Sym)* symbols_ = nullptr;
  const char* names_ = nullptr;
  std::vector<Table> tables_;
};

}  // namespace jaxnets
