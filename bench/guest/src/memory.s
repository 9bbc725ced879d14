# What the compiler expects a platform to have. The direction flag is clear by
# the ABI; string moves are as fast as any loop on processors with ERMS.
    .section .text.memory, "ax"
    .globl memcpy, memmove, memset, memcmp, bcmp
    .globl _Unwind_Resume, rust_eh_personality
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
memmove:
    mov rax, rdi
    mov rcx, rdx
    mov r8, rdi
    sub r8, rsi
    cmp r8, rdx
    jb 1f                               # the destination lies in the source
    rep movsb
    ret
1:  lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret
memset:
    mov r9, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r9
    ret
bcmp:
memcmp:
    xor eax, eax
    mov rcx, rdx
    jrcxz 2f
    repe cmpsb
    movzx eax, byte ptr [rdi - 1]
    movzx ecx, byte ptr [rsi - 1]
    sub eax, ecx
2:  ret
# Panics abort: nothing unwinds.
_Unwind_Resume:
rust_eh_personality:
    ud2
