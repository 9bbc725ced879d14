# From the PVH entry to a program at CPL 3, and back for interrupts.
#
# Everything at CPL 0 is short and in plain integer instructions: on a KVM
# without hardware virtualization each of them is emulated, while the program
# at CPL 3 runs at native speed. The program maps all memory, may use all
# ports through the bitmap of the task state segment, and sleeps by executing
# `hlt`, which faults into `sleep` below.

    .section .note.Xen, "a", @note
    .long 4, 4, 18                      # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_entry

    .section .boot32, "ax"
    .code32
    .globl pvh_entry
pvh_entry:                              # 32 bits, no paging, ebx = start info
    cli
    cld
    mov esp, offset kernel_stack_end
    mov dword ptr [start_info], ebx

    # Identity map of 4 GiB in pages of 2 MiB, for the program too. The last
    # GiB is devices: uncached.
    mov eax, offset page_directories + 7
    mov edi, offset page_directory_pointers
    mov ecx, 4
1:  mov [edi], eax
    add eax, 0x1000
    add edi, 8
    dec ecx
    jnz 1b
    mov dword ptr [page_map], offset page_directory_pointers + 7
    mov eax, 0x87                       # present, writable, user, 2 MiB
    mov edi, offset page_directories
    mov ecx, 4 * 512
2:  cmp ecx, 512
    jne 3f
    or eax, 0x10                        # uncached
3:  mov [edi], eax
    add eax, 0x200000
    add edi, 8
    dec ecx
    jnz 2b

    mov eax, offset page_map
    mov cr3, eax
    mov eax, 0x620                      # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov ecx, 0xc0000080                 # EFER
    rdmsr
    or eax, 0x100                       # LME
    wrmsr
    mov eax, 0x80000033                 # PG, NE, ET, MP, PE
    mov cr0, eax
    lgdt [gdt_pointer]
    # A far jump into 64-bit code.
    .byte 0xea
    .long long_mode
    .word 0x08

    .code64
long_mode:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    # The task state segment: stack for interrupts, and a bitmap of zeros that
    # lets the program use every port.
    mov eax, offset task_state
    mov word ptr [gdt + 0x28 + 2], ax
    shr eax, 16
    mov byte ptr [gdt + 0x28 + 4], al
    mov byte ptr [gdt + 0x28 + 7], ah
    mov qword ptr [task_state + 4], offset kernel_stack_end
    mov word ptr [task_state + 102], 104
    mov byte ptr [task_state + 104 + 8192], 0xff
    mov eax, 0x28
    ltr ax
    # 256 gates, to 256 stubs of 16 bytes.
    mov edi, offset idt
    mov eax, offset exception_stubs
    mov ecx, 32
    call fill_gates
    mov eax, offset interrupt_stubs
    mov ecx, 224
    call fill_gates
    # A `hlt` of the program is a general protection fault.
    mov edi, offset idt + 13 * 16
    mov eax, offset general_protection
    call set_gate
    lidt [idt_pointer]
    # The old interrupt controllers stay silent.
    mov al, 0xff
    out 0x21, al
    out 0xa1, al

    push 0x23                           # ss
    push offset program_stack_end
    push 0x202                          # rflags: interrupts on
    push 0x1b                           # cs
    push offset program
    iretq

program:                                # CPL 3
    xor ebp, ebp
    mov edi, dword ptr [start_info]
    call guest_main
    ud2

# Gates from edi on, ecx of them, to stubs of 16 bytes from eax on.
fill_gates:
    mov word ptr [rdi + 2], 0x08
    mov word ptr [rdi + 4], 0xee00      # interrupt gate, also for CPL 3
    call set_gate
    add eax, 16
    add edi, 16
    dec ecx
    jnz fill_gates
    ret

set_gate:
    mov edx, eax
    mov word ptr [rdi], ax
    shr edx, 16
    mov word ptr [rdi + 6], dx
    ret

# `hlt` at CPL 3: sleep until the counter at rdi differs from rsi. Interrupts
# are off here, so one that comes between the comparison and the halt wakes
# the halt: none is lost.
general_protection:
    push rax
    mov rax, [rsp + 16]                 # rip; the error code is above rax
    cmp byte ptr [rax], 0xf4
    jne 6f
    pop rax
    add rsp, 8                          # the error code
    inc qword ptr [rsp]                 # skip the hlt
4:  cmp [rdi], rsi
    jne 5f
    inc qword ptr [halts]
    sti
    hlt
    cli
    jmp 4b
5:  iretq
6:  pop rax
    push 13
    jmp exception

# An interrupt with vector 32 + n: count it and end it.
    .balign 16
interrupt_stubs:
    .set vector, 32
    .rept 224
    .balign 16
    push vector
    jmp interrupt
    .set vector, vector + 1
    .endr
interrupt:
    push rax
    mov rax, [rsp + 8]
    inc qword ptr [interrupts + rax * 8]
    mov eax, 0xfee000b0                 # end of interrupt
    mov dword ptr [rax], 0
    pop rax
    add rsp, 8
    iretq

    .balign 16
exception_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    push vector
    jmp exception
    .set vector, vector + 1
    .endr
exception:                              # "!" vector and four words, in hex
    mov edx, 0x3f8
    mov al, '!'
    out dx, al
    xor r8d, r8d
7:  mov rbx, [rsp + r8 * 8]
    mov al, ' '
    out dx, al
    mov ecx, 8
8:  rol ebx, 4
    mov eax, ebx
    and eax, 15
    add eax, '0'
    cmp eax, '9'
    jbe 9f
    add eax, 39
9:  out dx, al
    dec ecx
    jnz 8b
    inc r8d
    cmp r8d, 5
    jne 7b
    mov al, 10
    out dx, al
    mov edx, 0xf4                       # debug exit
    mov al, 0x7f
    out dx, al
    cli
    hlt

    .section .data
    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # 0x08: code, CPL 0
    .quad 0x00cf93000000ffff            # 0x10: data, CPL 0
    .quad 0x00affb000000ffff            # 0x18: code, CPL 3
    .quad 0x00cff3000000ffff            # 0x20: data, CPL 3
    .quad 0x0000890000002068, 0         # 0x28: task state, 8,297 bytes
gdt_pointer:
    .word 55
    .quad gdt
idt_pointer:
    .word 4095
    .quad idt
start_info:
    .quad 0
    .globl halts
halts:
    .quad 0

    .section .bss
    .balign 4096
page_map:
    .skip 4096
page_directory_pointers:
    .skip 4096
page_directories:
    .skip 4 * 4096
idt:
    .skip 4096
    .globl interrupts
interrupts:                             # by vector
    .skip 256 * 8
task_state:
    .skip 104 + 8192 + 8
    .balign 16
    .skip 16384
kernel_stack_end:
    .skip 262144
program_stack_end:
